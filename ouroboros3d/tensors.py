"""Records of tensors that move as one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self


class Tensors:
    """Base of a dataclass whose fields are tensors, or records of some; other fields stay as they are."""

    def map(self, change: Callable[[Any], Any]) -> Self:
        """A copy with every tensor and every record changed."""
        return replace(self, **{k: change(x) for k, x in vars(self).items() if isinstance(x, Tensor | Tensors)})

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """To a device or dtype, as Tensor.to."""
        return self.map(lambda x: x.to(*args, **kwargs))

    def detach(self) -> Self:
        return self.map(lambda x: x.detach())

    def pin_memory(self) -> Self:
        """In page-locked memory, from which CUDA copies without waiting; the data loader asks for it."""
        return self.map(lambda x: x.pin_memory())
