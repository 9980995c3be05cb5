"""ThinK (arXiv 2407.21018, section 3.2): of each head's keys only the channels that queries use most."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from trimming.policies.around import Around
from trimming.policies.keep_all import KeepAll
from trimming.policies.policy import Policy, check_ratio


@dataclass(frozen=True)
class ThinK(Around):
    """Each layer's every head of keys keeps the channels with the largest product of norms, of the prompt's queries and of the
    kept keys, ‖Q_i‖ · ‖K_i‖ = ‖Q_i K_iᵀ‖_F (equation 2); queries are cut alike when decoding, and scaled as for all channels.

    Of which features those keys are is another policy's decision. Values stay whole. The paper's queries are those of the last
    32 rows, to spare computing; here of all rows that see what decoding will see, and of all query heads that share the keys.
    The most recent keys, which the paper leaves whole, are a text's.
    """

    keep: float
    """Share of the key channels, in (0, 1]."""
    policy: Policy = field(default_factory=KeepAll)

    slices: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_ratio("keep", self.keep)
        if self.policy.slices:
            raise ValueError("the channels of keys can be cut once: give a policy that leaves them whole")

    def key_width(self, head_dim: int) -> int:
        return max(1, round(self.keep * head_dim))

    def channels(self, query: Tensor, key: Tensor) -> Tensor:
        used = query.float().square().sum(1) * key.float().square().sum(1)
        # Stable, so that equals do not depend on the device's order: the lower one stays.
        ranked: Tensor = used.argsort(dim=-1, descending=True, stable=True)
        return ranked[:, : self.key_width(key.shape[-1])].sort(-1).values
