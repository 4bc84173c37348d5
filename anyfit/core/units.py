"""What is decided: the matrices of a network and the units that they form."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Weight:
    """One stored matrix, as the matrix product sees it: `shape` is (outputs, inputs).

    `name` is its parameter's name in the network's class (`model.layers.0.self_attn.q_proj.weight`). `input`
    names what it multiplies: matrices with the same `input` see the same vectors and share statistics; None
    for a table that is only looked up. `transposed` says that the checkpoint stores (inputs, outputs), as
    GPT-2's Conv1D does. `tied` names the other parameters that are this very tensor.
    """

    name: str
    shape: tuple[int, int]
    role: str
    input: str | None
    block: int | None = None
    transposed: bool = False
    tied: tuple[str, ...] = ()

    @property
    def num_weights(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Unit:
    """The smallest part that is decided as a whole: one matrix, or several that the target fuses."""

    name: str
    weights: tuple[Weight, ...]

    @property
    def num_weights(self) -> int:
        return sum(weight.num_weights for weight in self.weights)
