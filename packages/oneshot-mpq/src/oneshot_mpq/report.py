"""Which layer has which bits, what it costs, and what differs between two configurations, as tables."""

from papercore.errors import InputError
from papercore.report import Table

from oneshot_mpq.bitconfig import BitConfig
from oneshot_mpq.supernet import Supernet


def report(net: Supernet, config: BitConfig | None = None) -> list[Table]:
    """A table of the layers, and one of the totals with the strict costs beside those that budgets count.

    Args:
        config: nothing: the bits that are set.

    Raises:
        InputError: the configuration is another network's.
    """
    from oneshot_mpq.cost import CostModel

    config = net.config() if config is None else config
    config.check(net)
    cost, strict = net.cost(config), CostModel(net).strict(config)
    layers = {**net.layers, **net.fixed}
    rows = []
    for layer in cost.per_layer:
        quantizer = layers[layer.name].act_quantizer
        sign = "-" if quantizer is None else "signed" if quantizer.signed else "unsigned"
        kind = "searched" if layer.name in net.layers else "fixed"
        act_bits = layer.act_bits if quantizer is not None else "float"
        macs = net.macs[layer.name] / 1e6
        rows.append((layer.name, kind, layer.weight_bits, act_bits, sign, macs, layer.bitops_G, 1024 * layer.size_MiB))
    columns = ("layer", "", "weight bits", "input bits", "input", "MACs (M)", "BitOps (G)", "size (KiB)")
    totals = [
        ("as budgets count", cost.bitops_G, cost.size_MiB),
        ("strict", strict.bitops_G, strict.size_MiB),
    ]
    return [
        Table(f"layers of {net.name}", columns, rows),
        Table("totals", ("", "BitOps (G)", "size (MiB)"), totals),
    ]


def compare(first: BitConfig, second: BitConfig) -> list[Table]:
    """The layers whose bits differ, and costs and measured values side by side.

    Raises:
        InputError: the configurations are of different models.
    """
    if first.model != second.model:
        raise InputError("configurations", found=f"{first.model} and {second.model}", expected="one model")
    totals = []
    for name, a, b in (
        ("BitOps (G)", first.bitops_G, second.bitops_G),
        ("size (MiB)", first.size_MiB, second.size_MiB),
        *(
            (key, first.metrics.get(key), second.metrics.get(key))
            for key in dict.fromkeys([*first.metrics, *second.metrics])
        ),
    ):
        change = b - a if isinstance(a, int | float) and isinstance(b, int | float) else "-"
        totals.append((name, "-" if a is None else a, "-" if b is None else b, change))
    return [
        Table("layers that differ", ("layer", "first", "second"), first.diff(second)),
        Table("totals", ("", "first", "second", "change"), totals),
    ]
