"""Published methods. One line a recipe."""

from anyfit.core.registry import Registry
from anyfit.recipes.base import Recipe

recipes: Registry[Recipe] = Registry(
    "recipe",
    {
        "any-precision": "anyfit.recipes.any_precision:RECIPE",
        "double-rounding": "anyfit.recipes.double_rounding:RECIPE",
        "essential-sparsity": "anyfit.recipes.essential_sparsity:RECIPE",
        "gptq": "anyfit.recipes.gptq:RECIPE",
        "hessian-aware": "anyfit.recipes.hessian_aware:RECIPE",
        "llm-qfa": "anyfit.recipes.llm_qfa:RECIPE",
        "matquant": "anyfit.recipes.matquant:RECIPE",
        "optin": "anyfit.recipes.optin:RECIPE",
        "pv-tuning": "anyfit.recipes.pv_tuning:RECIPE",
        "qat": "anyfit.recipes.qat:RECIPE",
        "rtn": "anyfit.recipes.rtn:RECIPE",
        "sandwich": "anyfit.recipes.sandwich:RECIPE",
        "shiftnas": "anyfit.recipes.shiftnas:RECIPE",
        "ziplm": "anyfit.recipes.ziplm:RECIPE",
    },
)
