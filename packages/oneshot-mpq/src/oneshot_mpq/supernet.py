"""A network whose layers share one set of weights at all bit-widths (specification of the method, 2.2)."""

import contextlib
import copy
import fnmatch
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from papercore.errors import InputError
from papercore.quant import macs
from torch import Tensor, nn

from oneshot_mpq.batchnorm import BatchNormBank
from oneshot_mpq.bitconfig import BitConfig, FixedBits, LayerBits
from oneshot_mpq.features import Features
from oneshot_mpq.layers import QuantLayer, supported
from oneshot_mpq.lsq import FLOAT, check_bits
from oneshot_mpq.tracing import Facts, Layer, trace

if TYPE_CHECKING:
    from oneshot_mpq.cost import Cost, CostModel

Sign = Literal["auto", "signed", "unsigned"]
NEGATIVE = 1e-5
"""an input is signed when its smallest value is below minus this share of its largest magnitude"""


class Supernet(nn.Module):
    """A converted copy of `model`; its forward pass is the model's, at the bits that are set.

    Convolutions and linear layers are found by running the model once. The first and the last one called keep 8 bits
    (the first one's input is not quantised), the others can have any pair of `bits`; depthwise convolutions not 2.

    Args:
        model: stays as it is. Its first forward argument is the only one.
        example_input: a batch as the model takes it; its shape is the one that costs are counted for.
        bits: candidates for weights and activations.
        fixed: name, or pattern like "*.attn", of layers that are not searched -> (weight bits, activation bits or
            nothing); 32 leaves a part in floating point, whatever it is. Nothing: the first and the last layer.
        act_sign: whether inputs are quantised with negative codes: by observation, or always, or never, or by name.
        per_channel: a weight step for every output channel.
        gradient_scaling: scale the steps' gradients as the LSQ paper does.
        symmetric: leave out the smallest negative code.
        name: written into bit configurations; nothing: the model's class.

    Raises:
        InputError: bits out of range, an unknown name, a layer that is called twice or applies its weight by a
            function, no searchable layer.
    """

    def __init__(
        self,
        model: nn.Module,
        example_input: Float[Tensor, "n *shape"],
        bits: Iterable[int] = (2, 3, 4, 5, 6),
        fixed: Mapping[str, tuple[int, int | None]] | None = None,
        act_sign: Sign | Mapping[str, Sign] = "auto",
        per_channel: bool = False,
        *,
        gradient_scaling: bool = False,
        symmetric: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__()
        self.bits = check_bits(bits)
        self.name = name or type(model).__name__
        self.input_shape = (1, *example_input.shape[1:])
        self.options: dict[str, Any] = {
            "per_channel": per_channel,
            "gradient_scaling": gradient_scaling,
            "symmetric": symmetric,
        }
        self.model = copy.deepcopy(model)
        facts = trace(self.model, example_input)
        self.macs = {operation.name: operation.macs for operation in macs.trace(self.model, example_input).operations}
        """multiply-accumulates of one sample by layer, and by attention for its two products"""
        given = {facts.first: (8, None), facts.last: (8, 8)} if fixed is None else dict(fixed)
        self.chosen = chosen = _match(given, self.model)
        """the parts that are not searched, with their bits; also those that are no layers"""
        _check(facts, chosen)
        self.sign = _signs(act_sign, facts)
        self.features = Features()
        self._cost_model: CostModel | None = None
        self._layers: dict[str, QuantLayer] = {}
        self._fixed: dict[str, QuantLayer] = {}
        for layer in facts.layers.values():
            self._convert(layer, chosen.get(layer.name))
        if not self._layers:
            raise InputError("fixed", found="every layer", expected="at least one layer left to search")
        bare = [name for name, layer in self._layers.items() if layer.batchnorm is None]
        convolutions = [name for name in bare if self._layers[name].kind == "conv"]
        if convolutions:
            warnings.warn(
                f"no batch norm of its own follows {', '.join(convolutions)}: one set of statistics for all bits there",
                stacklevel=2,
            )

    def _convert(self, facts: Layer, fixed: tuple[int, int | None] | None) -> None:
        """Puts a quantised layer, and a bank for its batch norm, into their places."""
        signed = self.sign[facts.name] == "signed" or (self.sign[facts.name] == "auto" and facts.minimum < -NEGATIVE)
        if fixed is None:
            weights = activations = _without_two(self.bits, facts)
        else:
            weights, activations = (fixed[0],), None if fixed[1] is None else (fixed[1],)
        layer = QuantLayer(
            facts.module, weights, activations, depthwise=facts.depthwise, act_signed=signed, **self.options
        )
        layer.name = facts.name
        layer.train(facts.module.training)
        _replace(self.model, facts.module, layer)
        if fixed is not None:
            self._fixed[facts.name] = layer
            return
        assert activations is not None
        layer.tap = self.features
        self._layers[facts.name] = layer
        if facts.batchnorm is not None:
            norm = self.model.get_submodule(facts.batchnorm)
            bank = BatchNormBank(norm, weights, activations)
            bank.layer, bank.tap = facts.name, self.features
            layer.follow(bank)
            _replace(self.model, norm, bank)

    @property
    def layers(self) -> dict[str, QuantLayer]:
        """The searchable layers in the order of the model's `named_modules`."""
        return self._layers

    @property
    def fixed(self) -> dict[str, QuantLayer]:
        """The layers with fixed bits, in the same order."""
        return self._fixed

    @property
    def calibrated(self) -> bool:
        """Whether every step has been set."""
        return all(
            layer.act_quantizer is None or layer.act_quantizer.ready
            for layer in (*self._layers.values(), *self._fixed.values())
        )

    def forward(self, x: Float[Tensor, "n *shape"]) -> Any:
        return self.model(x)

    def set_bits(self, config: BitConfig) -> None:
        """From now on the network computes with these bits.

        Raises:
            InputError: the configuration is another network's; nothing is changed then.
        """
        config.check(self)
        for bits, layer in zip(config.layers, self._layers.values(), strict=True):
            layer.select(bits.weight_bits, bits.act_bits)

    def select(self, weight_bits: Sequence[int], act_bits: Sequence[int]) -> None:
        """The same from one number a layer, not checked: for training and search."""
        for layer, w, a in zip(self._layers.values(), weight_bits, act_bits, strict=True):
            layer.select(w, a)

    def select_largest(self) -> None:
        """Every layer at the most bits that it may have now."""
        for layer in self._layers.values():
            layer.select(layer.allowed_weight_bits[-1], layer.act_choices[-1])

    def config(self) -> BitConfig:
        """The bits that are set, with their cost."""
        return BitConfig.of(
            self,
            [layer.weight_bits for layer in self._layers.values()],
            [layer.act_bits or FLOAT for layer in self._layers.values()],
        )

    def cost(self, config: BitConfig | None = None) -> "Cost":
        """Bit operations and size of a configuration; nothing: of the bits that are set."""
        from oneshot_mpq.cost import CostModel

        self._cost_model = costs = self._cost_model or CostModel(self)
        if config is None:
            config = BitConfig(
                self.name,
                tuple(self.input_shape),
                tuple(LayerBits(n, v.weight_bits, v.act_bits or FLOAT) for n, v in self._layers.items()),
                tuple(FixedBits(n, v.weight_bits, v.act_bits) for n, v in self._fixed.items()),
            )
        return costs.cost(config)

    @contextlib.contextmanager
    def floating(self) -> Iterator[None]:
        """Inside, nothing is quantised; batch norms stay at the pair that is set."""
        layers = (*self._layers.values(), *self._fixed.values())
        before = [(layer.weight_bits, layer.act_bits) for layer in layers]
        try:
            for layer in layers:
                layer.weight_bits = layer.act_bits = FLOAT
            yield
        finally:
            for layer, (w, a) in zip(layers, before, strict=True):
                layer.weight_bits, layer.act_bits = w, a

    @torch.no_grad()
    def calibrate(self, images: Tensor | Iterable[Any]) -> None:
        """Sets all activation steps and signs from what the float network's layers see (2.1).

        Args:
            images: a batch, or batches of images or of (images, labels).

        Raises:
            InputError: no image, values that are not finite, or negative ones where `act_sign` says unsigned.
        """
        seen: dict[str, list[tuple[float, float, Tensor]]] = {}
        layers = {**self._layers, **self._fixed}
        observed = {n: v for n, v in layers.items() if v.act_quantizer is not None}

        def observe(layer: nn.Module, arguments: tuple[Tensor]) -> None:
            x = arguments[0].detach()
            magnitude = x.abs()
            assert isinstance(layer, QuantLayer)
            seen.setdefault(layer.name, []).append((float(x.min()), float(magnitude.max()), magnitude.double().mean()))

        handles = [layer.register_forward_pre_hook(observe) for layer in observed.values()]
        training = {module: module.training for module in self.modules()}
        device = next(self.parameters()).device
        count = 0
        try:
            self.eval()
            with self.floating():
                for batch in [images] if isinstance(images, Tensor) else images:
                    x = batch[0] if isinstance(batch, tuple | list) else batch
                    if len(x):
                        self(x.to(device))
                        count += len(x)
        finally:
            for handle in handles:
                handle.remove()
            for module, mode in training.items():
                module.training = mode
        if not count:
            raise InputError("calibration images", found="none", expected="at least one")
        found = {name: _summary(name, values) for name, values in seen.items()}
        for name, (least, largest, _) in found.items():  # first everything is checked
            if self.sign[name] == "unsigned" and least < -NEGATIVE * largest:
                raise InputError(
                    f"input of {name}", found=f"values down to {least:.4g}", expected="none below 0 (act_sign unsigned)"
                )
        for name, (least, largest, mean) in found.items():
            quantizer = layers[name].act_quantizer
            assert quantizer is not None
            if self.sign[name] == "auto":
                quantizer.signed = least < -NEGATIVE * largest
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # said below, with the names
                quantizer.initialise_from_mean(mean.to(quantizer.steps))
        empty = [name for name, (_, largest, _) in found.items() if largest == 0]
        if empty:
            warnings.warn(f"{', '.join(empty)}: inputs are all zero; steps take the smallest value", stacklevel=2)


def _summary(name: str, values: Sequence[tuple[float, float, Tensor]]) -> tuple[float, float, Tensor]:
    """Smallest value, largest magnitude and mean magnitude over the batches (each counts the same)."""
    least, largest = min(v[0] for v in values), max(v[1] for v in values)
    mean = torch.stack([v[2] for v in values]).mean()
    if not torch.isfinite(mean):
        raise InputError(f"input of {name}", found="NaN or infinity", expected="numbers")
    return least, largest, mean


def _match(given: Mapping[str, tuple[int, int | None]], model: nn.Module) -> dict[str, tuple[int, int | None]]:
    """The names that the patterns of `fixed` mean, with their bits checked."""
    names = [name for name, _ in model.named_modules()]
    chosen: dict[str, tuple[int, int | None]] = {}
    for pattern, bits in given.items():
        if not isinstance(bits, tuple | list) or len(bits) != 2:
            raise InputError(f"fixed[{pattern!r}]", found=bits, expected="(weight bits, activation bits or None)")
        check_bits([bits[0]], f"fixed[{pattern!r}]")
        if bits[1] is not None:
            check_bits([bits[1]], f"fixed[{pattern!r}]")
        matched = fnmatch.filter(names, pattern)
        if not matched:
            raise InputError("fixed", found=pattern, expected="the name of a part of the model, or a pattern")
        chosen |= dict.fromkeys(matched, (bits[0], bits[1]))
    return chosen


def _check(facts: Facts, fixed: Mapping[str, tuple[int, int | None]]) -> None:
    """Raises InputError for what cannot be searched and is not fixed."""

    def refuse(what: str, names: Sequence[str], bits: str) -> None:
        named = names[0] or "the model itself"
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise InputError(
            f"{named}{more}", found=what, expected="one layer module for every use", hint=f"fixed={{{named!r}: {bits}}}"
        )

    outside = [name for name in facts.functional if fixed.get(name, (0, 0))[0] != FLOAT]
    if outside:
        refuse("a weight applied with a function instead of a layer", outside, "(32, None) leaves it in float")
    twice = [name for name, layer in facts.layers.items() if layer.calls > 1 and name not in fixed]
    if twice:
        refuse("a layer called more than once in a forward pass", twice, "(8, 8)")
    shared = [name for name in facts.shared if name not in fixed]
    if shared:
        refuse("a weight shared with another layer", shared, "(8, 8)")
    strange = [
        name
        for name, layer in facts.layers.items()
        if not supported(layer.module) and fixed.get(name, (0, 0))[0] != FLOAT
    ]
    if strange:
        kind = type(facts.layers[strange[0]].module).__name__
        refuse(f"a {kind}, whose forward pass is not known here", strange, "(32, None) leaves it in float")


def _signs(act_sign: Sign | Mapping[str, Sign], facts: Facts) -> dict[str, Sign]:
    """The wish for every layer.

    Raises:
        InputError: another word, or an unknown name.
    """
    wishes: dict[str, Sign] = dict.fromkeys(facts.layers, "auto")
    if isinstance(act_sign, str):
        wishes = dict.fromkeys(facts.layers, act_sign)
    else:
        for name, sign in act_sign.items():
            if name not in wishes:
                raise InputError("act_sign", found=name, expected="the name of a convolution or linear layer")
            wishes[name] = sign
    for sign in wishes.values():
        if sign not in ("auto", "signed", "unsigned"):
            raise InputError("act_sign", found=sign, expected="auto, signed or unsigned")
    return wishes


def _without_two(bits: tuple[int, ...], layer: Layer) -> tuple[int, ...]:
    """Depthwise layers do not go down to two bits (2.2)."""
    if not layer.depthwise:
        return bits
    left = tuple(b for b in bits if b > 2)
    if not left:
        raise InputError("bits", found=bits, expected=f"more than 2 as well, for the depthwise layer {layer.name}")
    return left


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """At every place where it lies."""
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
