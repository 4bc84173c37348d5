"""Any-Precision LLM: codebooks of rows, and one stored matrix of codes whose upper bits are every smaller size."""

from anyfit.formats import TABLE_BITS
from anyfit.recipes.base import Recipe

_TABLES = tuple(f"table{bits}" for bits in reversed(TABLE_BITS))

RECIPE = Recipe(
    name="any-precision",
    title="Codebooks for each row, nested in one another, without training",
    paper="Any-Precision LLM, arXiv 2402.10517",
    about=(
        "Each row has tables of its own, by exact weighted k-means at three bits; every cluster is split in two for a further bit, up to "
        "eight. So a code of few bits is the upper bits of a code of many: the family keeps one matrix of codes and its tables for all "
        "sizes, and a folder that was exported is read at any smaller size, too. Tables take as many bits as they are long: in rows of "
        "4096 all sizes up to eight bits are 9.98 stored bits a weight, up to seven 7.98; where rows are so short that they would take "
        "16, the finest size isn't offered. The family's notes say what each size would lose with tables of its own. Choose it where one "
        "file is to serve several sizes, nothing is to be trained, and rows are long. Nothing makes good a rounding error, so at equal "
        "bytes GPTQ's integers are often closer. Differs from the paper in the weights of the k-means, which are the mean squares of the "
        "inputs, in a size of two bits, and in cuts that are exact: see anyfit/formats/fitting_tables.py."
    ),
    quantizer="rtn",
    score="kl",
    formats={"transformers": (_TABLES,)},
    needs=_TABLES,
)
