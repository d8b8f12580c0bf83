"""The path from (timestep, label) to the modulation of every block: one embedder, and tables for a whole run.

In diffusers' DiT every block holds its own timestep and label embedders (27 x 2.78 M redundant parameters in DiT-XL/2)
and runs them in every forward. Sharing them is exact (specification 5.3). The modulation (adaLN, a third of DiT-XL/2's
block weights) depends on timestep and label only, so that a sampling run can compute it beforehand (specification 7).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import CombinedTimestepLabelEmbeddings
from jaxtyping import Float, Int
from papercore.errors import InputError
from torch import Tensor, nn
from torch.nn import functional

SHARED_KEY = "shared_embedders"

# ---- one embedder


def share_embedders(model: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """Makes all blocks of `model` use the timestep and label embedder of the first; outputs stay the same bits.

    It runs once a forward instead of once a block, and is stored once: `config.json` gets `"shared_embedders": true`,
    and the weights hold `transformer_blocks.0.norm1.emb` alone. `qdit.load_pretrained` reads such a folder, diffusers'
    `from_pretrained` after `qdit.register()`. A model in training mode runs the embedder for every block as before,
    because each block drops labels at random by itself.

    Returns:
        `model` itself.

    Raises:
        InputError: not a DiT of diffusers, or embedders that differ (models trained in diffusers have independent
            ones); names the first tensor that differs.
    """
    _require_dit(model)
    blocks: Any = model.transformer_blocks
    if _shares(model):
        return model
    first = blocks[0].norm1.emb
    for i, block in enumerate(blocks[1:], 1):
        own = block.norm1.emb.state_dict()
        for name, tensor in first.state_dict().items():
            if not torch.equal(own[name], tensor):
                raise InputError(
                    f"tensor transformer_blocks.{i}.norm1.emb.{name}",
                    found="values that differ from those of block 0",
                    expected="the same bits in every block, to share them",
                )
        if block.norm1.emb.time_proj.downscale_freq_shift != first.time_proj.downscale_freq_shift:
            raise InputError(f"frequency shift of block {i}", found="another than that of block 0", expected="the same")
    follow_first_embedder(model)
    return model


def follow_first_embedder(model: DiTTransformer2DModel) -> None:
    """`share_embedders` without comparing: for a model whose weights are not read yet."""
    blocks: Any = model.transformer_blocks
    shared = SharedEmbedder(blocks[0].norm1.emb)
    blocks[0].norm1.emb = shared
    for block in blocks[1:]:
        block.norm1.emb = EmbedderOfFirstBlock(shared)
    model.register_forward_pre_hook(shared.begin)
    model.register_forward_hook(shared.end, always_call=True)
    model.register_to_config(**{SHARED_KEY: True})


class SharedEmbedder(CombinedTimestepLabelEmbeddings):
    """The first block's embedder, with the same tensor names; computes once while the model's forward runs."""

    def __init__(self, embedder: CombinedTimestepLabelEmbeddings) -> None:
        nn.Module.__init__(self)  # takes over the parts that exist instead of making new ones
        self.time_proj = embedder.time_proj
        self.timestep_embedder = embedder.timestep_embedder
        self.class_embedder = embedder.class_embedder
        self.train(embedder.training)
        self._inside = False
        self._kept: tuple[Tensor, Tensor, torch.dtype | None, Tensor] | None = None

    def begin(self, *_: object) -> None:
        self._inside, self._kept = True, None

    def end(self, *_: object) -> None:
        self._inside, self._kept = False, None

    def forward(self, timestep: Tensor, class_labels: Any, hidden_dtype: torch.dtype | None = None) -> Tensor:
        if not self._inside or self.training:
            return super().forward(timestep, class_labels, hidden_dtype)
        kept = self._kept
        if kept is None or kept[0] is not timestep or kept[1] is not class_labels or kept[2] != hidden_dtype:
            embedded = super().forward(timestep, class_labels, hidden_dtype)
            kept = self._kept = (timestep, class_labels, hidden_dtype, embedded)
        return kept[3]


class EmbedderOfFirstBlock(nn.Module):
    """Stands in a later block for the first block's embedder; holds no tensors of its own."""

    def __init__(self, first: SharedEmbedder) -> None:
        super().__init__()
        self._first = (first,)  # in a tuple, so that torch does not count it as a part of this block too

    @property
    def time_proj(self) -> nn.Module:
        return self._first[0].time_proj

    def forward(self, timestep: Tensor, class_labels: Any, hidden_dtype: torch.dtype | None = None) -> Tensor:
        return self._first[0](timestep, class_labels, hidden_dtype)


def _shares(model: DiTTransformer2DModel) -> bool:
    return isinstance(model.transformer_blocks[0].norm1.emb, SharedEmbedder)  # pyright: ignore[reportAttributeAccessIssue]


# ---- tables for a run


@contextmanager
def precomputed_conditioning(
    model: nn.Module, timesteps: Sequence[int] | Int[Tensor, " t"], labels: Sequence[int] | Int[Tensor, " y"]
) -> Iterator[None]:
    """While the block runs, `model` reads its modulation from tables instead of computing it.

    Every (timestep, label) pair goes through each block's adaLN, and through the first layer of the output, in one
    product; the forwards look their rows up. The weights of adaLN are then not read at all. The modulation agrees with
    the plain one to the order of summation, also for quantised adaLN: outputs to 1e-6 relative in float32, unless an
    activation lies so near the border of two codes that it changes to the other. The model is put back on leaving,
    also by an exception. No gradients.

    Memory: T timesteps x Y labels x (6 x blocks + 2) x width numbers of the model's type. DiT-XL/2 in float16, 50 steps
    with one label and "no class": 50 x 2 x 170 x 1152 x 2 bytes = 39 MB; with all 1001 labels 20 GB.

    Args:
        timesteps: all that the forwards will use, whole numbers, in any order.
        labels: all that the forwards will use, with that of "no class".

    Raises:
        InputError: not a DiT of diffusers in evaluation mode; an empty list; labels the model does not have; in a
            forward, a timestep or label that is in no table.
    """
    model = _require_dit(model)
    if model.training:
        raise InputError("model", found="training mode, which drops labels at random", expected="model.eval()")
    blocks: Any = model.transformer_blocks
    if isinstance(blocks[0].norm1.emb, _RowFinder):
        raise InputError("the model's conditioning is precomputed already")
    classes: int = model.config.num_embeds_ada_norm  # pyright: ignore[reportAttributeAccessIssue]
    rows = _RowFinder(
        _distinct(timesteps, "timesteps", None), _distinct(labels, "labels", classes), model.pos_embed.proj.weight
    )
    tables, last = _tables(model, rows)
    before = [(block.norm1.emb, block.norm1.linear) for block in blocks], model.proj_out_1
    try:
        for i, (block, table) in enumerate(zip(blocks, tables, strict=True)):
            block.norm1.emb = rows if i == 0 else _RowsOfFirstBlock(rows)
            block.norm1.linear = _Table(rows, table)
        model.proj_out_1 = _Table(rows, last)  # pyright: ignore[reportAttributeAccessIssue]
        yield
    finally:
        for block, (embedder, linear) in zip(blocks, before[0], strict=True):
            block.norm1.emb, block.norm1.linear = embedder, linear
        model.proj_out_1 = before[1]


@torch.no_grad()
def _tables(model: DiTTransformer2DModel, rows: "_RowFinder") -> tuple[list[Tensor], Tensor]:
    """Modulation [T Y, 6 D] of every block and [T Y, 2 D] of the output, for all pairs."""
    timesteps, labels = rows.pairs()
    blocks: Any = model.transformer_blocks
    tables: list[Tensor] = []
    first = conditioning = None
    for block in blocks:
        if conditioning is None or not isinstance(block.norm1.emb, EmbedderOfFirstBlock):
            conditioning = functional.silu(block.norm1.emb(timesteps, labels, hidden_dtype=rows.like.dtype))
        if first is None:
            first = conditioning
        tables.append(block.norm1.linear(conditioning))
    return tables, model.proj_out_1(first)


class _RowFinder(nn.Module):
    """In the place of the first block's embedder: finds the rows of a batch in the tables and keeps them for them.

    The output only stands in for an embedding; nobody reads its values.
    """

    def __init__(self, timesteps: Int[Tensor, " t"], labels: Int[Tensor, " y"], like: Tensor) -> None:
        super().__init__()
        self.like = like.detach()
        self.timesteps, self.labels = timesteps.to(like.device), labels.to(like.device)
        self.rows = torch.empty(0, dtype=torch.long, device=like.device)

    def pairs(self) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]:
        """Timestep and label of every row of the tables."""
        return self.timesteps.repeat_interleave(len(self.labels)), self.labels.repeat(len(self.timesteps))

    def forward(self, timestep: Tensor, class_labels: Tensor, hidden_dtype: torch.dtype | None = None) -> Tensor:
        places = []
        for name, known, wanted in (("timestep", self.timesteps, timestep), ("label", self.labels, class_labels)):
            wanted = wanted.to(known.device)
            place = torch.searchsorted(known, wanted.long().contiguous()).clamp(max=len(known) - 1)
            unknown = known[place] != wanted
            if bool(unknown.any()):
                raise InputError(
                    f"{name} {wanted[unknown][0].item()}", found="no such table", expected=f"one of {known.tolist()}"
                )
            places.append(place)
        self.rows = places[0] * len(self.labels) + places[1]
        return self.stand_in(hidden_dtype)

    def stand_in(self, hidden_dtype: torch.dtype | None) -> Float[Tensor, "n 1"]:
        return self.like.new_zeros(len(self.rows), 1, dtype=hidden_dtype)


class _RowsOfFirstBlock(nn.Module):
    """In the place of a later block's embedder: the rows are found already."""

    def __init__(self, rows: _RowFinder) -> None:
        super().__init__()
        self._rows = (rows,)

    def forward(self, _timestep: Tensor, _labels: Tensor, hidden_dtype: torch.dtype | None = None) -> Tensor:
        return self._rows[0].stand_in(hidden_dtype)


class _Table(nn.Module):
    """In the place of a linear layer whose outputs are known: gives the rows found for this batch."""

    def __init__(self, rows: _RowFinder, table: Float[Tensor, "pairs out"]) -> None:
        super().__init__()
        self._rows, self.table = (rows,), table

    def forward(self, _: Tensor) -> Float[Tensor, "n out"]:
        return self.table[self._rows[0].rows]


def _distinct(values: Sequence[int] | Tensor, what: str, most: int | None) -> Int[Tensor, " n"]:
    """The different values, ascending."""
    tensor = torch.as_tensor(values)
    if tensor.numel() == 0 or tensor.ndim != 1 or tensor.is_floating_point():
        raise InputError(what, found=f"{tensor.dtype} {tuple(tensor.shape)}", expected="a list of whole numbers")
    if int(tensor.min()) < 0 or (most is not None and int(tensor.max()) > most):
        expected = "at least 0" if most is None else f"0..{most}"
        raise InputError(what, found=f"{int(tensor.min())}..{int(tensor.max())}", expected=expected)
    return tensor.long().unique()


def _require_dit(model: nn.Module) -> DiTTransformer2DModel:
    if not isinstance(model, DiTTransformer2DModel):
        raise InputError("model", found=type(model).__name__, expected="DiTTransformer2DModel")
    return model
