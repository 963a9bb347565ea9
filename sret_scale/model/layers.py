"""The layers of SReT: sliced attention, feed-forward, learnable residual, block, projection and pooling.

Shape letters: B batch, N tokens, D width, H heads, K head width, G groups, L tokens per group, F hidden channels.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sret_scale.model.applications import (
    BranchScale,
    LoopPosition,
    ResidualConstants,
    branch_scales,
    post_norm,
    residual_constants,
    resolved_skip,
)
from sret_scale.model.conditioning import LoopDeltas, conditioning
from sret_scale.model.config import StageConfig
from sret_scale.model.cross_attention import CrossAttention, Sight
from sret_scale.model.operations import Affine, operations
from sret_scale.model.operations import unfused as plain
from sret_scale.model.operations.fused import NORM_EPS
from sret_scale.model.stored_sizes import Sizes
from sret_scale.model.windows import place_pairs

# From a shape to the next dropout mask of a call (`noise.Dropout`).
Draw = Callable[[Sequence[int]], Tensor]
Constants = tuple[float | Tensor, float | Tensor]
"""Values of `ResidualConstants`, or tensors of one value, which a compiled graph takes for any depth."""


class LearnableResidual(nn.Module):
    """The coefficients of `alpha * x + multiplier * beta * f(x)` (the paper's LRC, section 3.3).

    Where the norm follows the residual (`depth.post_norm`), both terms have a constant factor and `norm` is applied.
    """

    def __init__(self, stage: StageConfig, width: int, scale: BranchScale, constants: ResidualConstants) -> None:
        super().__init__()
        self.multiplier, self.stream_constant = constants
        self.alpha = None if resolved_skip(stage) == "frozen" else nn.Parameter(torch.ones(1))
        # None once it is folded into the layer before it (`inference.folded`).
        self.beta: nn.Parameter | None = nn.Parameter(torch.full((width if scale.per_channel else 1,), scale.init))

    def coefficients(
        self, x_BND: Tensor, mask: Tensor | None, draw: Draw | None, constants: Constants | None = None
    ) -> dict[str, Tensor | None]:
        """Keyword arguments of the operations: alpha, gain_R, and the masks of stochastic depth and dropout in one.

        constants: those of another number of loops than the stage was built with.
        """
        alpha: Tensor | None = self.alpha
        multiplier, stream = constants or (self.multiplier, self.stream_constant)
        if isinstance(stream, Tensor) or stream != 1.0:
            constant = stream if isinstance(stream, Tensor) else x_BND.new_full((1,), stream)
            alpha = constant if alpha is None else alpha * constant
        if draw is not None:
            mask = draw(x_BND.shape) if mask is None else mask * draw(x_BND.shape)
        gain_R: Tensor | None = self.beta
        # In the published scheme the multiplier is 1, and 60 products of two scalars a step cost what they cost.
        if gain_R is not None and (isinstance(multiplier, Tensor) or multiplier != 1.0):
            gain_R = gain_R * multiplier
        return {"alpha": alpha, "gain_R": gain_R, "mask": mask}


class Attention(nn.Module):
    """Weights of multi-head self-attention inside equal, contiguous slices of the tokens (group self-attention)."""

    pairs: Tensor

    def __init__(self, stage: StageConfig, sizes: Sizes, *, is_causal: bool) -> None:
        super().__init__()
        self.is_causal = is_causal
        self.num_heads, self.head_width = stage.num_heads, sizes.head_width
        self.padding = sizes.stored_head_width - sizes.head_width
        inner_width = stage.num_heads * sizes.stored_head_width
        self.qkv = nn.Linear(sizes.width, 3 * inner_width)
        self.out = nn.Linear(inner_width, sizes.width)
        self.inner_norm = nn.LayerNorm(stage.width, eps=NORM_EPS) if stage.norm_placement == "subln" else None
        if stage.slices == "windows":
            pairs = place_pairs(stage.window)
            self.offsets = nn.Parameter(torch.zeros(stage.num_heads, len(pairs)))
            self.register_buffer("pairs", pairs, persistent=False)

    def mix(self, qkv_BNC: Tensor, groups: int, hidden: Tensor | None = None, sight: Sight | None = None) -> Tensor:
        """(B, N, D) attention of (B, N, 3D) queries, keys, values. Groups fold into the batch of one fused call.

        hidden: (G, 1, 1, L) of windows, added to the scores of keys beside the bias of their places.
        sight: of tokens that are not sliced.
        """
        qkv = rearrange(qkv_BNC, "b (g l) (three h k) -> three (b g) h l k", g=groups, three=3, h=self.num_heads)
        # unbind, since the gradients of three indexings would be three full-size tensors of mostly zeros.
        query, key, value = qkv.unbind(0)
        if hidden is None:
            mixed = self.attend(query, key, value, None if sight is None else sight.mask)
        else:
            mixed = self._mix_windows(query, key, value, hidden)
        if self.inner_norm is None or not self.padding:
            mixed_BND = rearrange(mixed, "(b g) h l k -> b (g l) (h k)", g=groups)
            return mixed_BND if self.inner_norm is None else self.inner_norm(mixed_BND)
        real_BND = rearrange(mixed[..., : self.head_width], "(b g) h l k -> b (g l) (h k)", g=groups)
        heads = rearrange(self.inner_norm(real_BND), "b n (h k) -> b n h k", h=self.num_heads)
        return F.pad(heads, (0, self.padding)).flatten(-2)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B G, H, L, K) of queries, keys and values of this shape."""
        options = {"is_causal": self.is_causal, "scale": self.head_width**-0.5}
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, **options)

    def bias(self, hidden: Tensor) -> Tensor:
        """(G, H, L, L) what windows add to the scores."""
        # A product with a one-hot table: the backward pass of an index would add up in any order.
        return rearrange(self.offsets @ self.pairs, "h (i j) -> h i j", i=hidden.shape[-1]) + hidden

    def _mix_windows(self, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor) -> Tensor:
        bias_GHLL = self.bias(hidden).to(query.dtype)
        # Groups stay a dimension of their own here, so that the bias is not copied for every image.
        query, key, value = (rearrange(x, "(b g) h l k -> b g h l k", g=len(hidden)) for x in (query, key, value))
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias_GHLL, scale=self.head_width**-0.5)
        return mixed.flatten(0, 1)

    def unpadded(self, qkv_BNC: Tensor) -> Tensor:
        """(B, N, 3D) of the channels that are real."""
        if not self.padding:
            return qkv_BNC
        parts = rearrange(qkv_BNC, "b n (parts k) -> b n parts k", parts=3 * self.num_heads)
        return parts[..., : self.head_width].flatten(-2)


class FeedForward(nn.Module):
    """Weights of two linear layers with an exact GELU between them."""

    def __init__(self, width: int, hidden_width: int, inner_norm: nn.LayerNorm | None) -> None:
        """Widths as stored; inner_norm is in front of the second layer."""
        super().__init__()
        self.fc1 = nn.Linear(width, hidden_width)
        self.fc2 = nn.Linear(hidden_width, width)
        self.inner_norm = inner_norm

    def residual(
        self,
        x_BND: Tensor,
        norm: Affine | None,
        fc1: Affine,
        coefficients: dict[str, Tensor | None],
        draw: Draw | None,
    ) -> Tensor:
        """The stream after the sub-layer; norm None leaves the input as it is (a norm follows the residual)."""
        fc2 = (self.fc2.weight, self.fc2.bias)
        if norm is not None and self.inner_norm is None and draw is None:
            return operations().feed_forward_residual(x_BND, norm, fc1, fc2, **coefficients)
        hidden_BNF = F.linear(x_BND, *fc1) if norm is None else operations().norm_linear(x_BND, *norm, *fc1)
        a_BNF = F.gelu(hidden_BNF)
        if draw is not None:
            a_BNF = a_BNF * draw(a_BNF.shape)
        if self.inner_norm is not None:
            a_BNF = plain.layer_norm(a_BNF, self.inner_norm.weight, self.inner_norm.bias)
        return operations().project_residual(x_BND, a_BNF, *fc2, **coefficients)


class Block(nn.Module):
    """The shared set of weights of a recursion: attention and feed-forward, each with norm and learnable residual.

    is_causal: tokens attend to those before them in their slice, and to themselves.
    has_memory: they attend to a memory too, between the two.
    """

    def __init__(self, stage: StageConfig, sizes: Sizes, *, is_causal: bool = False, has_memory: bool = False) -> None:
        super().__init__()
        scale, _ = branch_scales(stage)
        constants, _ = residual_constants(stage)
        self.norms_after = post_norm(stage) is not None
        self.width, self.num_heads, self.is_causal = stage.width, stage.num_heads, is_causal
        self.norm1 = nn.LayerNorm(stage.width, eps=NORM_EPS)
        self.attention = Attention(stage, sizes, is_causal=is_causal)
        self.residual1 = LearnableResidual(stage, sizes.width, scale, constants)
        self.cross = CrossAttention(stage, sizes) if has_memory else None
        self.residual_cross = LearnableResidual(stage, sizes.width, scale, constants) if has_memory else None
        self.norm2 = nn.LayerNorm(stage.width, eps=NORM_EPS)
        self.feed_forward = FeedForward(sizes.width, sizes.hidden_width, _inner_norm(stage, stage.hidden_width))
        self.residual2 = LearnableResidual(stage, sizes.width, scale, constants)
        self.conditioning = conditioning(stage, sizes)
        self.outer_norm = nn.LayerNorm(stage.width, eps=NORM_EPS) if stage.norm_placement == "outer" else None

    @property
    def residuals(self) -> tuple[LearnableResidual, ...]:
        """Those of its sub-layers, in their order."""
        between = () if self.residual_cross is None else (self.residual_cross,)
        return self.residual1, *between, self.residual2

    def forward(
        self,
        x_BND: Tensor,
        loop: int,
        groups: int,
        masks: Tensor | None = None,
        draw: Draw | None = None,
        place: LoopPosition | None = None,
        hidden: Tensor | None = None,
        sight: Sight | None = None,
    ) -> Tensor:
        """The stream after one use of the block; masks (2, B, 1, 1) scales both branches of each sample.

        place: where the loop stands, in a stage that runs other than all its loops. hidden, sight: `Attention.mix`.
        """
        constants = None if place is None else place.block
        return self.transform(x_BND, self._deltas(loop, place), groups, masks, draw, constants, hidden, sight)

    def transform(
        self,
        x_BND: Tensor,
        deltas: LoopDeltas,
        groups: int,
        masks: Tensor | None,
        draw: Draw | None,
        constants: Constants | None,
        hidden: Tensor | None = None,
        sight: Sight | None = None,
    ) -> Tensor:
        """The stream after one use with what its loop adds; nothing else tells loops apart, so a graph serves them all.

        constants: the residuals', in a stage that runs other than all its loops.
        """
        mask1, mask2 = (None, None) if masks is None else masks
        norm1, norm2 = self._norms(deltas)
        attention = self.attention
        x_BND = operations().project_residual(
            x_BND,
            attention.mix(self._qkv(x_BND, norm1, deltas), groups, hidden, sight),
            attention.out.weight,
            attention.out.bias,
            **self.residual1.coefficients(x_BND, mask1, draw, constants),
        )
        if self.norms_after:
            x_BND = plain.layer_norm(x_BND, *norm1)
        if self.cross is not None and self.residual_cross is not None:
            # A sample's branch is dropped with that of its other attention.
            x_BND = self.cross(x_BND, sight, self.residual_cross.coefficients(x_BND, mask1, draw, constants))
        fc1 = _shifted(self.feed_forward.fc1, deltas.fc1)
        before = None if self.norms_after else norm2
        coefficients = self.residual2.coefficients(x_BND, mask2, draw, constants)
        x_BND = self.feed_forward.residual(x_BND, before, fc1, coefficients, draw)
        return plain.layer_norm(x_BND, *norm2) if self.norms_after else x_BND

    def finished(self, x_BND: Tensor) -> Tensor:
        """The stream as an application leaves it, its projection included: normed where the placement is "outer"."""
        norm = self.outer_norm
        return x_BND if norm is None else plain.layer_norm(x_BND, norm.weight, norm.bias)

    def qkv(self, x_BND: Tensor, loop: int, place: LoopPosition | None = None) -> Tensor:
        """(B, N, 3D) queries, keys and values of one use, for whoever looks at its attention."""
        deltas = self._deltas(loop, place)
        return self.attention.unpadded(self._qkv(x_BND, self._norms(deltas)[0], deltas))

    def _deltas(self, loop: int, place: LoopPosition | None) -> LoopDeltas:
        return LoopDeltas() if self.conditioning is None else self.conditioning.deltas(loop, place)

    def _qkv(self, x_BND: Tensor, norm1: Affine, deltas: LoopDeltas) -> Tensor:
        qkv = _shifted(self.attention.qkv, deltas.qkv)
        return F.linear(x_BND, *qkv) if self.norms_after else operations().norm_linear(x_BND, *norm1, *qkv)

    def _norms(self, deltas: LoopDeltas) -> tuple[Affine, Affine]:
        norms: tuple[Affine, Affine] = ((self.norm1.weight, self.norm1.bias), (self.norm2.weight, self.norm2.bias))
        if deltas.norms is None:
            return norms
        (scale1, bias1), (scale2, bias2) = norms
        delta = deltas.norms
        return (scale1 + delta[0, 0], bias1 + delta[0, 1]), (scale2 + delta[1, 0], bias2 + delta[1, 1])


class NonLinearProjection(nn.Module):
    """The layer after each application, which keeps a recursion from collapsing (the paper's NLL, section 3.2)."""

    def __init__(self, stage: StageConfig, sizes: Sizes) -> None:
        super().__init__()
        _, scale = branch_scales(stage)
        _, constants = residual_constants(stage)
        self.norms_after = post_norm(stage) is not None
        self.norm = nn.LayerNorm(stage.width, eps=NORM_EPS)
        inner_norm = _inner_norm(stage, stage.projection_hidden_width)
        self.feed_forward = FeedForward(sizes.width, sizes.projection_hidden_width, inner_norm)
        self.residual = LearnableResidual(stage, sizes.width, scale, constants)

    def forward(self, x_BND: Tensor, draw: Draw | None = None, place: LoopPosition | None = None) -> Tensor:
        return self.transform(x_BND, draw, None if place is None else place.projection)

    def transform(self, x_BND: Tensor, draw: Draw | None, constants: Constants | None) -> Tensor:
        """See `Block.transform`."""
        fc1 = (self.feed_forward.fc1.weight, self.feed_forward.fc1.bias)
        before = None if self.norms_after else (self.norm.weight, self.norm.bias)
        coefficients = self.residual.coefficients(x_BND, None, draw, constants)
        x_BND = self.feed_forward.residual(x_BND, before, fc1, coefficients, draw)
        return plain.layer_norm(x_BND, self.norm.weight, self.norm.bias) if self.norms_after else x_BND


def _inner_norm(stage: StageConfig, hidden_width: int) -> nn.LayerNorm | None:
    return nn.LayerNorm(hidden_width, eps=NORM_EPS) if stage.norm_placement == "subln" else None


def _shifted(layer: nn.Linear, delta: Tensor | None) -> Affine:
    return (layer.weight if delta is None else layer.weight + delta), layer.bias


def pooling(width: int, next_width: int) -> nn.Conv2d:
    """Halves the grid and widens the channels between stages: a depthwise 3 x 3 convolution of stride 2."""
    return nn.Conv2d(width, next_width, kernel_size=3, stride=2, padding=1, groups=width)
