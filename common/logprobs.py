"""Log-probs, entropy and KL from hidden states and the output matrix, with no [N, V] tensor in memory.

    z = hidden @ weight.T / temperature                [N, V], of which only a tile ever exists
    logp    = z_y - lse                                lse = log sum_j exp(z_j)
    entropy = -sum_j p_j log p_j                       p_j = exp(z_j - lse)
    kl      =  sum_j p_j (log p_j - log q_j)           q: the same from the reference's hidden and weight

Forward: one pass over tiles [tokens, vocabulary]. Per token: the maximum m so far and, relative to it,

    s = sum_{j != argmax} exp(z_j - m)                 logp    = (z_y - m) - log1p(s)
    u = sum_j exp(z_j - m) w_j                         entropy = log1p(s) - u / (1 + s)
                                                       kl      = u / (1 + s) - log1p(s) + log1p(s')
    w_j = z_j - m                  for the entropy
    w_j = z_j - m - (z'_j - m')    for the KL, primes marking the reference

The argmax's own term, exp(0) = 1, stays out of s: where 1 + 1e-12 would be 1 in float32, the log-prob and the entropy
of a token of probability 1 - 1e-12 keep their relative accuracy.

Backward: every tile of logits becomes its gradient g, which enters two matrix products. With upstream gradients a on
logp and c on kl (or -c on entropy: both are the same function of w),

    g_j = a (1{j = y} - p_j) + c p_j (w_j - u / (1 + s))
    grad_hidden = g @ weight / temperature             grad_weight = g.T @ hidden / temperature

in float32; 1 - p_y is -expm1(logp), without cancellation. Some models change their logits: `scale` (Cohere, Granite)
and then a soft cap c (Gemma) make z = c tanh(scale * hidden @ weight.T / c) / temperature, whose slope
scale * (1 - (z temperature / c)^2) multiplies g. The backward computes each tile again, or reads what the forward
stored of it (`keep`). PyTorch computes the products. The token side is a Triton kernel on CUDA, elsewhere passes over a
tile in cache. A tile is float32: logits around 10, rounded to bf16, move a log-prob by some 0.01. docs/logprobs.md has
what was measured.

Shapes: N tokens, H hidden, V vocabulary; n and v of a tile.
"""

import os

import torch
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LOWEST = -1e30  # "no logit yet"; also stands for -inf, whose differences would be NaN


def linear_logprobs(
    hidden, weight, targets, *, temperature=1.0, entropy=False,
    cap=0.0, scale=1.0, keep=None, backend="auto", chunk_size=None, tile_size=None,
):  # fmt: skip
    """Log-prob of every target, and the entropy of its distribution, under softmax(hidden @ weight.T / T).

    hidden [N, H], weight [V, H], targets [N] int64 -> logp [N], or (logp [N], entropy [N]).
    Float32 out (float64 for float64 in). Differentiable in hidden and weight; what is frozen costs nothing.
    A weight sharded by FSDP2 is whole inside the forward of the module that owns it: call this there.

    scale, cap: the model's own change of its logits, cap * tanh(scale * z / cap) before T divides them; cap 0: none.
    keep: store 2 bytes a logit for the backward, which then needs no logits again (docs/logprobs.md). None:
    for bf16 inputs on CUDA, if that takes at most half of the free memory. Not with a cap.
    backend: "triton", "torch", or "auto" for Triton on CUDA and torch elsewhere. chunk_size: tokens at a time,
    tile_size: vocabulary entries at a time, chosen from the shapes when None.
    IndexError for a target outside [0, V) on the CPU; a check would stall a GPU, so the log-prob is NaN there."""
    settings = _check(hidden, weight, targets, temperature, backend), _form(temperature, cap, scale), entropy
    keep = (_has_room(hidden, weight) if keep is None else keep) and not cap
    tiling = _tiling(hidden, weight, chunk_size, tile_size)
    logp, negated = _Linear.apply(hidden, weight, targets, None, None, settings, tiling, keep)
    return (logp, -negated) if entropy else logp


def logprobs_from_logits(
    logits, targets, *, temperature=1.0, entropy=False, cap=0.0, scale=1.0, backend="auto", chunk_size=None
):
    """Do the same from existing logits: logits [N, V], targets [N] -> logp [N], or (logp [N], entropy [N])."""
    settings = _check(logits, None, targets, temperature, backend), _form(temperature, cap, scale), entropy
    fused, (n, v) = settings[0], logits.shape
    if fused:
        logits = logits.contiguous()
    tiling = _slices(n, max(1, n if fused else chunk_size or 2**22 // v)), [slice(0, v)]
    logp, negated = _Linear.apply(logits, None, targets, None, None, settings, tiling, False)
    return (logp, -negated) if entropy else logp


def linear_kl(
    hidden, weight, ref_hidden, ref_weight, *, temperature=1.0, cap=0.0, scale=1.0, backend="auto", chunk_size=None,
    tile_size=None,
):  # fmt: skip
    """KL(pi || ref) over the whole vocabulary at every token: [N, H], [V, H], [N, H'], [V, H'] -> [N].

    Differentiable in hidden and weight; the reference is a constant. T, scale and cap change the logits of both."""
    settings = _check(hidden, weight, None, temperature, backend), _form(temperature, cap, scale), True
    _check(ref_hidden, ref_weight, None, temperature, backend)
    if (shape := (len(hidden), len(weight))) != (ref_shape := (len(ref_hidden), len(ref_weight))):
        raise ValueError(f"policy and reference differ in (N, V): {shape} and {ref_shape}")
    tiling = _tiling(hidden, weight, chunk_size, tile_size)
    nowhere = hidden.new_full((len(hidden),), -1).long()  # targets in no tile
    return _Linear.apply(hidden, weight, nowhere, ref_hidden, ref_weight, settings, tiling, False)[1]


def _check(hidden, weight, targets, temperature, backend):
    """Raise for a wrong argument (logits are passed as hidden); return whether Triton does the token side."""
    if hasattr(weight, "to_local"):
        raise TypeError("weight is a DTensor: call this inside the forward of the FSDP2 module that owns it")
    if hidden.dim() != 2 or (weight is not None and weight.shape[1:] != hidden.shape[1:]):
        shapes = [tuple(x.shape) for x in (hidden, weight) if x is not None]
        raise ValueError(f"not [N, H] and [V, H] (or logits, [N, V]): {shapes}")
    if not temperature > 0:
        raise ValueError(f"temperature {temperature} is not above 0")
    if targets is not None and targets.shape != hidden.shape[:1]:
        raise ValueError(f"{len(hidden)} tokens and targets of shape {tuple(targets.shape)}")
    if targets is not None and len(targets) and targets.device.type == "cpu":
        low, high = targets.aminmax()
        v = hidden.shape[1] if weight is None else len(weight)
        if low < 0 or high >= v:
            raise IndexError(f"targets from {low} to {high} in a vocabulary of {v}")
    possible = triton is not None and hidden.dtype != torch.float64 and (hidden.is_cuda or INTERPRETED)
    if backend not in ("auto", "torch", "triton") or (backend == "triton" and not possible):
        raise ValueError(f"backend {backend!r}: torch, auto, or triton on CUDA (or interpreted) and float32 at most")
    return backend == "triton" or (backend == "auto" and possible and hidden.is_cuda)


def _form(temperature, cap, scale):
    """How logits follow from a product z. (divisor, 0): z / divisor. (divisor, outer): outer * tanh(z / divisor)."""
    if cap < 0 or not scale > 0:
        raise ValueError(f"a soft cap of {cap} and a scale of {scale}: the cap is 0 or more, the scale above 0")
    return (cap / scale, cap / temperature) if cap else (temperature / scale, 0.0)


# The matrix side: which tile, its product, and what takes up its gradient.


def _tiling(hidden, weight, chunk_size, tile_size):
    """Chunks of tokens and tiles of vocabulary, as slices."""
    # 4 MB tiles stay in a CPU's cache; 512 MB tiles make products that are large enough for a GPU's full rate.
    chunk, size = (8192, 2**27) if hidden.is_cuda else (1024, 2**20)
    chunk = max(1, min(len(hidden), chunk_size or max(chunk, size // len(weight))))
    return _slices(len(hidden), chunk), _slices(len(weight), tile_size or max(1, size // chunk))


def _has_room(hidden, weight):
    """Whether `keep` is on if the caller leaves it None: bf16 on CUDA with memory to spare."""
    if not hidden.is_cuda or hidden.dtype != torch.bfloat16 or weight.dtype != torch.bfloat16:
        return False
    return 2 * len(hidden) * len(weight) <= free_memory(hidden.device) / 2


def free_memory(device) -> int:
    """Bytes of a GPU that can still be allocated: free ones, and those that torch's allocator holds unused."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def _slices(total, size):
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def _mm(a, b, out, accumulate=False):
    """out = a @ b, or out += a @ b; bf16 or fp16 factors of a float32 out are summed in float32."""
    kwargs = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
    if accumulate:
        torch.addmm(out, a, b, out=out, **kwargs)
    else:
        torch.mm(a, b, out=out, **kwargs)


class _Head:
    """hidden @ weight.T, a tile at a time; without a weight, hidden are the logits."""

    def __init__(self, hidden, weight, fused):
        self.hidden, self.weight, self.fused, self.buffer = hidden, weight, fused, None
        dtype = hidden.dtype if weight is None else torch.promote_types(hidden.dtype, weight.dtype)
        self.sum_dtype = torch.promote_types(dtype, torch.float32)
        # Tensor cores give the float32 sums of bf16 products; a CPU would round them, so there it gets float32.
        self.dtype = dtype if hidden.is_cuda else self.sum_dtype

    def empty(self, r, c):
        """Return the buffer for a tile, [n, v]. It is reused: the tile before is overwritten."""
        n, v = r.stop - r.start, c.stop - c.start
        if self.buffer is None:  # the first tile is the largest
            self.buffer = torch.empty(n * v, dtype=self.sum_dtype, device=self.hidden.device)
        return self.buffer[: n * v].view(n, v)

    def tile(self, r, c):
        """The logits of a tile, [n, v]. Torch overwrites them, Triton does not."""
        if self.weight is None:
            return self.hidden[r] if self.fused else self.hidden[r].to(self.sum_dtype, copy=True)
        z = self.empty(r, c)
        _mm(self.hidden[r].to(self.dtype), self.weight[c].to(self.dtype).T, z)
        return z


def _heads(hidden, weight, ref_hidden, ref_weight, fused):
    """The policy's head and, if there is one, the reference's."""
    head = _Head(hidden, weight, fused)
    return [head] if ref_hidden is None else [head, _Head(ref_hidden, ref_weight, fused)]


class _Grads:
    """Accumulates tiles of the logits' gradient: all chunks of tokens for one vocabulary tile, then for the next."""

    def __init__(self, head, needs):
        self.head = head
        empty = torch.empty_like if len(head.hidden) else torch.zeros_like
        self.hidden = torch.zeros_like(head.hidden, dtype=head.sum_dtype) if needs[0] else None
        self.weight = empty(head.weight) if needs[1] else None

    def add(self, g, r, c):
        head, first, last = self.head, r.start == 0, r.stop == len(self.head.hidden)
        if self.hidden is not None:
            _mm(g, head.weight[c].to(head.dtype), self.hidden[r], accumulate=True)
        if self.weight is not None:
            tile = self.weight[c]
            if tile.dtype == head.sum_dtype or (tile.dtype == head.dtype and first and last):
                _mm(g.T, head.hidden[r].to(head.dtype), tile, accumulate=not first)
            else:  # summed over the chunks in float32, then rounded
                if first:
                    self.sum = torch.empty_like(tile, dtype=head.sum_dtype)
                _mm(g.T, head.hidden[r].to(head.dtype), self.sum, accumulate=not first)
                if last:
                    tile.copy_(self.sum)

    def finish(self):
        pairs = (self.hidden, self.head.hidden), (self.weight, self.head.weight)
        return [None if grad is None else grad.to(value.dtype) for grad, value in pairs]


class _Linear(torch.autograd.Function):
    """(logp, minus the entropy or None) of targets; or, with a reference and targets nowhere, (NaN, kl)."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, ref_hidden, ref_weight, settings, tiling, keep):
        fused, form, weighted = settings
        rows, cols = tiling
        heads = _heads(hidden, weight, ref_hidden, ref_weight, fused)
        kept = _Kept(hidden, weight, cols) if keep and any(ctx.needs_input_grad) else None
        state = _new_state(hidden)
        for i, c in enumerate(cols):
            for r in rows:
                tiles = [head.tile(r, c) for head in heads]
                stored = kept and kept.tile(i, r, c)
                _absorb(tiles, targets[r] - c.start, state[:, r], fused, form, weighted, stored)
        ctx.save_for_backward(hidden, weight, targets, ref_hidden, ref_weight, state)
        ctx.settings, ctx.tiling, ctx.kept = settings, tiling, kept
        ctx.set_materialize_grads(False)
        return _outputs(state, weighted, heads[0].sum_dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logp, grad_other):
        hidden, weight, targets, ref_hidden, ref_weight, state = ctx.saved_tensors
        fused, form, _ = ctx.settings
        heads, (rows, cols) = _heads(hidden, weight, ref_hidden, ref_weight, fused), ctx.tiling
        head = heads[0]
        factors = _factors(state, grad_logp, grad_other, form, head.sum_dtype)
        kept, ctx.kept = ctx.kept, None  # a second backward computes the logits again
        # The memory that g is written to:
        #   logits were given            all of g, [N, V], is what the caller gets
        #   E has the products' dtype    all of g is written over E; the products come after the loop
        #   products in bf16 or fp16     a new tile each time
        #   otherwise                    over the tile's logits; if E is kept, the unused buffer for them
        if weight is None:
            whole = torch.empty_like(hidden)
        else:
            whole = kept.e if kept and kept.e.dtype == head.dtype else None
            grads = _Grads(head, ctx.needs_input_grad)
        for i, c in enumerate(cols):
            for r in rows:
                tiles = [] if kept else [head.tile(r, c) for head in heads]
                if whole is not None:
                    g = whole[r, c]
                elif head.dtype != head.sum_dtype:
                    g = torch.empty(r.stop - r.start, c.stop - c.start, dtype=head.dtype, device=hidden.device)
                else:
                    g = tiles[0] if tiles else head.empty(r, c)
                stored = kept and kept.tile(i, r, c)
                _gradient(tiles, g, targets[r] - c.start, factors[:, r], fused, form, grad_other is not None, stored)
                if whole is None:
                    grads.add(g, r, c)
        if weight is None:
            return whole, *[None] * 7
        if whole is not None:
            grads.add(whole, slice(0, len(hidden)), slice(0, len(weight)))
        return *grads.finish(), *[None] * 6


class _Kept:
    """E = exp(z - top) of all tiles, [N, V] in bf16, and top: the maximum of each token in each block of a tile."""

    def __init__(self, hidden, weight, cols):
        self.e = torch.empty(len(hidden), len(weight), dtype=torch.bfloat16, device=hidden.device)
        blocks = [-(-(c.stop - c.start) // _block(c.stop - c.start)) for c in cols]  # torch fills the first of a tile
        self.tops = [torch.zeros(b, len(hidden), device=hidden.device) for b in blocks]

    def tile(self, i, r, c):
        """E [n, v] and top [blocks, n] of tile i."""
        return self.e[r, c], self.tops[i][:, r]


# The token side: what is known of every token, and how a tile of logits adds to it or becomes its gradient.
# tiles: [z [n, v]] of the policy and, for the KL, of the reference. targets: [n], indices relative to the tile; one
# outside of [0, v) belongs to another tile. weighted: whether u, or the gradient through it, is wanted. stored: the
# tile's (E, top) if the forward kept them, or None.


def _new_state(hidden):
    """m, s, u, z_y, m', s' [6, N], in float64: adding up tiles adds no error. A target not yet seen has NaN."""
    state = torch.zeros(6, len(hidden), dtype=torch.float64, device=hidden.device)
    state[0] = state[4] = LOWEST
    state[3] = float("nan")
    return state


def _outputs(state, weighted, dtype):
    """Log-probs and, if weighted, the KL; without a reference, where s' is 0, that is minus the entropy."""
    m, s, u, z_y, _, s_ref = state
    logp, other = (z_y - m) - s.log1p(), u / (1 + s) - s.log1p() + s_ref.log1p()
    return logp.to(dtype), other.to(dtype) if weighted else None


def _factors(state, grad_logp, grad_other, form, dtype):
    """m, f0, f1, g_y, m' [5, N] such that g_j = exp(z_j - m) (f0 + f1 w_j) for j != y, and the target's gradient is
    g_y. The slope of a soft cap is not included."""
    m, s, u, z_y, m_ref, _ = state
    x_y, total = z_y - m, 1 + s
    logp, mean = x_y - s.log1p(), u / total
    f0 = f1 = g_y = torch.zeros_like(m)
    if grad_logp is not None:
        f0, g_y = -grad_logp / total, -grad_logp * logp.expm1()
    if grad_other is not None:
        f1 = grad_other / total
        f0, g_y = f0 - f1 * mean, g_y + f1 * x_y.exp() * (x_y - mean)
    divisor = form[0] / (form[1] or 1.0)
    return torch.stack((m, f0 / divisor, f1 / divisor, g_y / divisor, m_ref)).to(dtype)


def _scaled(z, form):
    z = z if form[0] == 1.0 else z.div_(form[0])
    return z.tanh_().mul_(form[1]) if form[1] else z


def _locate(targets, v):
    """Which targets are in a tile, and a valid index for all: [n, 1] each."""
    return ((targets >= 0) & (targets < v))[:, None], targets.clamp(0, v - 1)[:, None]


def _exp_sum(x, m, s):
    """Update m and s of each token with logits x [n, v]; x becomes x minus the tile's maximum, top. Returns exp(x), its
    sum, (old m minus new m) and (top minus new m)."""
    top, argmax = x.max(1, keepdim=True)
    e = x.sub_(top.clamp_(min=LOWEST)).exp()
    s_tile = e.scatter_(1, argmax, 0.0).sum(1)
    new = torch.maximum(m, top[:, 0])
    before, after = m - new, top[:, 0] - new
    # of the two argmaxes one is the new one, and the other joins the sum
    s.copy_(before.exp() * s + after.exp() * s_tile + torch.minimum(before, after).exp())
    m.copy_(new)
    return e.scatter_(1, argmax, 1.0), 1 + s_tile, before, after


def _absorb(tiles, targets, state, fused, form, weighted, stored=None):
    """Adds a tile to the state of its tokens. (Torch works in place: z is lost.)"""
    if fused:
        return _launch(_absorb_kernel, tiles, targets, state, form, stored, WEIGHTED=weighted)
    m, s, u, z_y, m_ref, s_ref = state
    x, total = _scaled(tiles[0], form), 1 + s
    here, index = _locate(targets, x.shape[1])
    z_y.copy_(torch.where(here, x.gather(1, index), z_y[:, None])[:, 0])
    e, total_tile, before, after = _exp_sum(x, m, s)
    if stored:
        stored[0].copy_(e)
        stored[1][0] = m + after
    if weighted:
        w, shift, shift_tile = x.clamp_(min=LOWEST), before, after
        if len(tiles) == 2:
            x_ref = _scaled(tiles[1], form)
            _, _, before_ref, after_ref = _exp_sum(x_ref, m_ref, s_ref)
            w, shift, shift_tile = w.sub_(x_ref.clamp_(min=LOWEST)), before - before_ref, after - after_ref
        u_tile = w.mul_(e).sum(1)
        u.copy_(before.exp() * (u + shift * total) + after.exp() * (u_tile + shift_tile * total_tile))


def _gradient(tiles, g, targets, factors, fused, form, weighted, stored=None):
    """Writes a tile's gradient to g, which may be its z or its E. With E there are no tiles."""
    if fused:
        return _launch(_gradient_kernel, tiles, targets, factors, form, stored, g, WEIGHTED=weighted)
    m, f0, f1, g_y, m_ref = factors[:, :, None]
    if stored:
        x = (g if g.dtype == factors.dtype else g.to(factors.dtype)).copy_(stored[0])
        shift = stored[1][0][:, None] - m
    else:
        x = _scaled(tiles[0], form)
        slope = 1 - (x / form[1]).square_() if form[1] else None
        x.sub_(m)
    if weighted:
        e = x * shift.exp() if stored else x.exp()
        w = (x.log_().add_(shift) if stored else x).clamp_(min=LOWEST)
        if len(tiles) == 2:
            w.sub_(_scaled(tiles[1], form).sub_(m_ref).clamp_(min=LOWEST))
        torch.addcmul(f0, w, f1, out=x).mul_(e)
    elif stored:
        x.mul_(shift.exp() * f0)
    else:
        x.exp_().mul_(f0)
    here, index = _locate(targets, x.shape[1])
    x.scatter_(1, index, torch.where(here, g_y, x.gather(1, index)))
    if form[1]:
        x.mul_(slope)
    if g is not x:
        g.copy_(x)


# The same in Triton: a program for a token, which reads its logits once, a block at a time.


def _block(v):
    """Logits that a program reads at once, of a tile's v."""
    return min(4096, 1 << (v - 1).bit_length())


def _launch(kernel, tiles, targets, per_token, form, stored, *g, **flags):
    """Run a kernel with a program per token of a tile; if it writes a gradient g, one per token and block of logits."""
    e, top = stored or (None, None)
    z = tiles[0] if tiles else e
    (n, v), ref, block = z.shape, tiles[-1] if tiles else z, _block(z.shape[1])
    flags |= {"REF": len(tiles) == 2, "SCALED": form[0] != 1.0, "CAPPED": form[1] != 0.0}
    flags |= {"KEPT": stored is not None, "BLOCK": block}
    pairs = [(z, z.stride(0)), (ref, ref.stride(0)), *((x, x.stride(0) if x is not None else 0) for x in (e, top, *g))]
    with torch.cuda.device_of(z):
        kernel[(n, triton.cdiv(v, block) if g else 1)](
            *(x for pair in pairs for x in pair), targets.contiguous(), per_token, per_token.stride(0), v,
            *map(float, form), **flags, num_warps=max(1, block // 512),
        )  # fmt: skip


if triton is not None:

    @triton.jit
    def _tanh(x):
        """Relative error under 3e-7: a series near 0, where 1 - exp(-2x) would cancel."""
        y, t = x * x, tl.exp(-2.0 * tl.abs(x))
        series = 1.0 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835 - y * (1382 / 155925)))))
        far = tl.where(x < 0, -1.0, 1.0) * (1.0 - t) / (1.0 + t)
        return tl.where(tl.abs(x) < 0.25, x * series, far)

    @triton.jit
    def _load(z_ptr, col, v, divisor, outer, SCALED: tl.constexpr, CAPPED: tl.constexpr):
        """Logits in float32, -inf beyond the vocabulary."""
        z = tl.load(z_ptr + col, mask=col < v, other=-float("inf")).to(tl.float32)
        if SCALED:
            z = tl.div_rn(z, divisor)
        if CAPPED:
            z = tl.where(col < v, outer * _tanh(z), -float("inf"))
        return z

    @triton.jit
    def _exp_sum_block(x, m, s, BLOCK: tl.constexpr):
        """_exp_sum for the block of one token: also returns the new m and s, x relative to its maximum top, and top."""
        top, argmax = tl.max(x, 0, return_indices=True)
        top = tl.maximum(top, -1e30)
        x -= top
        e = tl.exp(x)
        s_block = tl.sum(tl.where(tl.arange(0, BLOCK) == argmax, 0.0, e), 0)
        new = tl.maximum(m, top)
        before, after = m - new, top - new
        s = tl.exp(before) * s + tl.exp(after) * s_block + tl.exp(tl.minimum(before, after))
        return new, s, tl.maximum(x, -1e30), e, 1.0 + s_block, before, after, top

    @triton.jit
    def _absorb_kernel(
        z_ptr, z_stride, ref_ptr, ref_stride, e_ptr, e_stride, top_ptr, top_stride,
        targets_ptr, state_ptr, state_stride, v, divisor, outer,
        WEIGHTED: tl.constexpr, REF: tl.constexpr, SCALED: tl.constexpr, CAPPED: tl.constexpr, KEPT: tl.constexpr,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        z_ptr += row * z_stride
        ref_ptr += row * ref_stride
        state_ptr += row
        m = tl.load(state_ptr).to(tl.float32)
        s = tl.load(state_ptr + state_stride)
        u = tl.load(state_ptr + 2 * state_stride)
        m_ref = tl.load(state_ptr + 4 * state_stride).to(tl.float32)
        s_ref = tl.load(state_ptr + 5 * state_stride)
        for start in range(0, v, BLOCK):
            col = start + tl.arange(0, BLOCK)
            total = 1.0 + s
            z = _load(z_ptr, col, v, divisor, outer, SCALED, CAPPED)
            m, s, w, e, total_block, before, after, top = _exp_sum_block(z, m, s, BLOCK)
            if KEPT:
                tl.store(e_ptr + row * e_stride + col, e, mask=col < v)
                tl.store(top_ptr + (start // BLOCK) * top_stride + row, top)
            if WEIGHTED:
                shift, shift_block = before, after
                if REF:
                    z = _load(ref_ptr, col, v, divisor, outer, SCALED, CAPPED)
                    m_ref, s_ref, w_ref, _, _, before_ref, after_ref, _ = _exp_sum_block(z, m_ref, s_ref, BLOCK)
                    w -= w_ref
                    shift -= before_ref
                    shift_block -= after_ref
                u_block = tl.sum(e * w, 0) + shift_block * total_block
                u = tl.exp(before) * (u + shift * total) + tl.exp(after) * u_block
        tl.store(state_ptr, m)
        tl.store(state_ptr + state_stride, s)
        tl.store(state_ptr + 2 * state_stride, u)
        tl.store(state_ptr + 4 * state_stride, m_ref)
        tl.store(state_ptr + 5 * state_stride, s_ref)
        target = tl.load(targets_ptr + row)
        if (target >= 0) & (target < v):
            tl.store(state_ptr + 3 * state_stride, _load(z_ptr, target, v, divisor, outer, SCALED, CAPPED))

    @triton.jit
    def _gradient_kernel(
        z_ptr, z_stride, ref_ptr, ref_stride, e_ptr, e_stride, top_ptr, top_stride, g_ptr, g_stride,
        targets_ptr, factors_ptr, factors_stride, v, divisor, outer,
        WEIGHTED: tl.constexpr, REF: tl.constexpr, SCALED: tl.constexpr, CAPPED: tl.constexpr, KEPT: tl.constexpr,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        factors_ptr += row
        m = tl.load(factors_ptr)
        f = tl.load(factors_ptr + factors_stride)
        if KEPT:
            e = tl.load(e_ptr + row * e_stride + col, mask=col < v, other=0.0).to(tl.float32)
            shift = tl.load(top_ptr + tl.program_id(1) * top_stride + row) - m
            x = tl.log(e) + shift
            e *= tl.exp(shift)
        else:
            x = _load(z_ptr + row * z_stride, col, v, divisor, outer, SCALED, CAPPED) - m
            e = tl.exp(x)
        if WEIGHTED:
            w = tl.maximum(x, -1e30)
            if REF:
                z = _load(ref_ptr + row * ref_stride, col, v, divisor, outer, SCALED, CAPPED)
                w -= tl.maximum(z - tl.load(factors_ptr + 4 * factors_stride), -1e30)
            f += tl.load(factors_ptr + 2 * factors_stride) * w
        g_y = tl.load(factors_ptr + 3 * factors_stride)
        g = tl.where(col == tl.load(targets_ptr + row), g_y, f * e)
        if CAPPED:
            g *= 1.0 - ((x + m) / outer) * ((x + m) / outer)
        tl.store(g_ptr + row * g_stride + col, g, mask=col < v)
