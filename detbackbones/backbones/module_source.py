"""ModuleSource: a user's own module as the source of a backbone."""

import copy
from collections.abc import Mapping, Sequence

from torch import nn

from ..measure.layers import LayerExtractor, check_layers
from .source import Levels, Source


class ModuleSource(Source):
    """Any module that maps images to anything; its levels are the outputs of some of its layers.

    Attributes:
        levels: all of them, with the names that the user gave them.
    """

    prefix = "model."

    def __init__(
        self,
        module: nn.Module,
        layers: Sequence[str] | Mapping[str, str],
        in_channels: int,
        img_size: int,
    ):
        """
        Args:
            module: left as it is.
            layers: names of its modules, or these names to the names of the levels.
            in_channels: channels of the images.
            img_size: the N of the N x N images that it takes.

        Raises:
            ValueError: if a layer does not give one feature map in one run.
        """
        super().__init__(type(module).__name__, in_channels)
        self._module, self._size = module, img_size
        self.levels = Levels(check_layers(module, layers, (img_size, img_size), in_channels))

    @classmethod
    def names(cls) -> list[str]:
        """None: the module is given."""
        return []

    @property
    def native_size(self) -> int:
        """``img_size``."""
        return self._size

    @property
    def level_keys(self) -> list[str]:
        """The names of the layers."""
        return self.levels.keys

    def create(self, pretrained: bool = False) -> nn.Module:
        """A copy of the module, with its weights."""
        return copy.deepcopy(self._module)

    def extractor(self, model: nn.Module, keys: Sequence[str]) -> LayerExtractor:
        """The outputs of some layers."""
        return LayerExtractor(model, keys)

    def forget_weights(self) -> None:
        """Keep the module on the meta device alone, when a backbone has its weights."""
        self._module = self.model
