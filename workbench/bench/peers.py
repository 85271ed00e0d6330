"""Peer libraries on the jobs of the families' benchmark, with our weights in their modules.

Both hold one condition's weights at a time, so several conditions go through one by one; the weights of all
of them can come from one pass of the library's own generator. hyperlight (0.0.5) applies given weights to any
module. hypnettorch (0.0.4, its last release) applies them to main networks of its own classes only, of which
no convolutional one has group norms. Its wheel names no dependency; it imports matplotlib, and runs with
torch 2.15.
"""

import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn

from workbench.hypernetworks import MLPGenerator

NEEDS = {"hyperlight": ("hyperlight",), "hypnettorch": ("hypnettorch", "matplotlib")}
Applied = Callable[[Sequence[Tensor], Tensor], Tensor]  # one condition's weights, inputs -> outputs
Generated = Callable[[Tensor], Sequence[Sequence[Tensor]]]  # two conditions or more -> the weights of each


class Hyperlight:
    """Modules whose parameters are set from outside for the time of a block."""

    name = "hyperlight"

    def __init__(self) -> None:
        """Import the library."""
        self.library = import_module("hyperlight")

    def layers(self, widths: Sequence[int]) -> Applied:
        """Return linear layers without bias, one after the other; a weight is (out, in) as torch has it."""
        found = [nn.Linear(*pair, bias=False) for pair in zip(widths, widths[1:], strict=False)]
        return self.module(nn.Sequential(*found), [f"{place}.weight" for place in range(len(found))])

    def module(self, target: nn.Module, names: Sequence[str]) -> Applied:
        """Return a module with all these parameters from outside; the module given is changed."""
        own = dict(target.named_parameters())
        target = self.library.hypernetize(target, parameters=[own[name] for name in names])

        def applied(weights: Sequence[Tensor], inputs: Tensor) -> Tensor:
            with target.using_externals(dict(zip(names, weights, strict=True))):
                return target(inputs)

        return applied

    def generator(self, ours: MLPGenerator) -> Generated:
        """Return the library's generator with the same layers and values as ours."""
        first, head = ours.body[0], ours.head
        shapes = {slot.name: slot.shape for slot in ours.spec.slots}
        made = self.library.HyperNet(
            {"code": (first.in_features,)}, shapes, [first.out_features], encoding=None,
            fc_kws={"nonlinearity": "GELU"},
        ).to(head.weight.device)  # fmt: skip
        _copied((made.backbone.block0_lin, made.backbone.output), (first, head))
        return lambda codes: list(zip(*made(code=codes).values(), strict=True))


class Hypnettorch:
    """Main networks that take a list of weights in every call."""

    name = "hypnettorch"

    def __init__(self) -> None:
        """Import the library."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its docstrings have escapes that newer Pythons warn of
            self.main = import_module("hypnettorch.mnets.mlp").MLP
            self.hyper = import_module("hypnettorch.hnets.mlp_hnet").HMLP

    def layers(self, widths: Sequence[int]) -> Applied:
        """Return linear layers without bias, one after the other; a weight is (out, in) as torch has it."""
        first, *hidden, last = widths
        made = self.main(
            n_in=first, n_out=last, hidden_layers=hidden, activation_fn=None, use_bias=False, no_weights=True,
            verbose=False,
        )  # fmt: skip
        return lambda weights, inputs: made.forward(inputs, weights=list(weights))

    def generator(self, ours: MLPGenerator) -> Generated:
        """Return the library's generator with the same layers and values as ours."""
        first, head = ours.body[0], ours.head
        shapes = [list(slot.shape) for slot in ours.spec.slots]
        made = self.hyper(
            shapes, uncond_in_size=first.in_features, cond_in_size=0, layers=[first.out_features],
            activation_fn=nn.GELU(), num_cond_embs=0, verbose=False,
        ).to(head.weight.device)  # fmt: skip
        values = (first.weight, first.bias, head.weight, head.bias)
        for parameter, value in zip(made.parameters(), values, strict=True):
            parameter.data.copy_(value.data)
        return lambda codes: made.forward(uncond_input=codes, ret_format="squeezed")


def _copied(theirs: Sequence[nn.Linear], ours: Sequence[nn.Linear]) -> None:
    for one, other in zip(theirs, ours, strict=True):
        one.load_state_dict(other.state_dict())


def peers() -> list[Any]:
    """Open the peer libraries that are installed with what they need."""
    ways = (Hyperlight, Hypnettorch)
    return [way() for way in ways if not missing(way.name)]


def missing(name: str) -> list[str]:
    """List the packages that a peer library needs and that are not installed."""
    return [package for package in NEEDS[name] if find_spec(package) is None]
