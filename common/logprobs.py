"""Log-probs, entropy and KL from hidden states and the output matrix, with no [N, V] tensor in memory.

    z = (hidden @ weight.T + bias) / temperature       [N, V], of which only a tile ever exists
    logp    = z_y - lse                                lse = log sum_j exp(z_j)
    entropy = -sum_j p_j log p_j                       p_j = exp(z_j - lse)
    kl      =  sum_j p_j (log p_j - log q_j)           q: the same from the reference's hidden and weight

Forward: one pass over tiles [tokens, vocabulary] with, per token, the maximum m so far and, relative to it,

    s = sum_{j != argmax} exp(z_j - m)                 lse = m + log1p(s)
    u = sum_j exp(z_j - m) (z_j - m)                   entropy = log1p(s) - u / (1 + s)
    d = sum_j exp(z_j - m) (z_j - m - (z'_j - m'))     kl = d / (1 + s) - log1p(s) + log1p(s')

The argmax's own term, exp(0) = 1, stays out of s: the log-prob and the entropy of a token of probability 1 - 1e-12
keep their relative accuracy in float32, where 1 + 1e-12 would be 1.

Backward: every tile of logits is computed again, overwritten by its gradient g, and taken up by two matrix products.
With upstream gradients a on logp, b on entropy and c on kl,

    g_j = a (1{j = y} - p_j) - b p_j (log p_j + entropy) + c p_j (log p_j - log q_j - kl)
    grad_hidden = g @ weight / temperature             grad_weight = g.T @ hidden / temperature

g is formed in float32 and without cancellation: 1 - p_y as -expm1(logp), log p_j + entropy as (z_j - m) - u / (1 + s),
log p_j - log q_j - kl as (z_j - m) - (z'_j - m') - d / (1 + s).

The matrix products are the library's (cuBLAS on CUDA), the token side is one read of the tile: a Triton kernel on
CUDA, a few vectorised passes over a tile that stays in cache elsewhere. Why not one fused kernel: the products are
over 9/10 of the work at H >= 896 (2 H flops a logit against some 10), the library has them tuned for every card and
shape, and a backward needs the tile's gradient twice, which a fused kernel must compute twice or add up atomically.
What it costs is writing and reading the tile once. That tile is float32 on CUDA too: rounding logits to bf16, as
the fused kernels' peers do, moves a log-prob by 0.01 and more. The loop is over the vocabulary outside and tokens
inside, so that weight's gradient is summed in float32 for one tile at a time and rounded once.
Measured on CPU only (docs/logprobs.md); the CUDA figures are open until they are measured.

Shapes: N tokens, H hidden, V vocabulary.
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
KEEP = 2**22  # logits that are kept for the backward rather than computed again: 16 MB
LOWEST = -1e30  # "no logit yet", and stands for -inf, whose differences would be NaN


def linear_logprobs(
    hidden,
    weight,
    targets,
    *,
    temperature=1.0,
    entropy=False,
    bias=None,
    backend="auto",
    chunk_size=None,
    tile_size=None,
):
    """Log-prob of every target, and the entropy of its distribution, under softmax((hidden @ weight.T + bias) / T).

    hidden [N, H], weight [V, H], targets [N] int64, bias [V] or None -> logp [N], or (logp [N], entropy [N]).
    Float32 out (float64 for float64 in). Differentiable in hidden, weight and bias; what is frozen costs nothing.
    A weight sharded by FSDP2 is whole inside the forward of the module that owns it: call this there.

    backend: "triton", "torch" or "auto" (Triton on CUDA). chunk_size: tokens at a time, tile_size: vocabulary
    entries at a time, chosen from the shapes when None. Logits that fit into one tile are kept for the backward.
    IndexError for a target outside [0, V) on the CPU; on a GPU, where the check would have to wait, a NaN log-prob.
    """
    fused = _check(hidden, weight, targets, temperature, backend)
    settings = temperature, entropy, fused, *_tiling(hidden, weight, chunk_size, tile_size)
    logp, ent = _LinearLogprobs.apply(hidden, weight, bias, targets, settings)
    return (logp, ent) if entropy else logp


def logprobs_from_logits(
    logits, targets, *, temperature=1.0, entropy=False, backend="auto", chunk_size=None, inplace=False
):
    """The same of logits that exist already: logits [N, V], targets [N] -> logp [N], or (logp [N], entropy [N]).

    inplace=True writes the gradient of the logits over the logits, where nothing else needs them.
    """
    fused = _check(logits, None, targets, temperature, backend)
    logp, ent = _LogprobsFromLogits.apply(logits, targets, (temperature, entropy, fused, chunk_size, inplace))
    return (logp, ent) if entropy else logp


def linear_kl(
    hidden,
    weight,
    ref_hidden,
    ref_weight,
    *,
    temperature=1.0,
    bias=None,
    ref_bias=None,
    backend="auto",
    chunk_size=None,
    tile_size=None,
):
    """KL(pi || ref) over the whole vocabulary at every token: [N, H], [V, H], [N, H'], [V, H'] -> [N].

    Differentiable in hidden, weight and bias; the reference is a constant. T divides the logits of both.
    """
    fused = _check(hidden, weight, None, temperature, backend)
    _check(ref_hidden, ref_weight, None, temperature, backend)
    if (len(hidden), len(weight)) != (len(ref_hidden), len(ref_weight)):
        raise ValueError(
            f"policy and reference differ in N or V: {hidden.shape} {weight.shape} and "
            f"{ref_hidden.shape} {ref_weight.shape}"
        )
    settings = temperature, fused, *_tiling(hidden, weight, chunk_size, tile_size)
    return _LinearKL.apply(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, settings)


def _check(hidden, weight, targets, temperature, backend):
    """Raises what is wrong with the arguments (logits come as hidden); returns whether Triton does the token side."""
    if hasattr(weight, "to_local"):
        raise TypeError("weight is a DTensor: call this inside the forward of the FSDP2 module that owns it")
    if hidden.dim() != 2 or (weight is not None and weight.shape[1:] != hidden.shape[1:]):
        raise ValueError(f"not [N, H] and [V, H]: {hidden.shape} and {weight.shape}")
    if not temperature > 0:
        raise ValueError(f"temperature {temperature} is not above 0")
    if targets is not None and len(targets) and targets.device.type == "cpu":
        low, high = targets.aminmax()
        v = hidden.shape[1] if weight is None else len(weight)
        if low < 0 or high >= v:
            raise IndexError(f"targets from {low} to {high} in a vocabulary of {v}")
    possible = triton is not None and hidden.dtype != torch.float64 and (hidden.is_cuda or INTERPRETED)
    if backend not in ("auto", "torch", "triton") or (backend == "triton" and not possible):
        raise ValueError(f"backend {backend!r}: torch, auto, or triton on CUDA (or interpreted), float32 at most")
    return backend == "triton" or (backend == "auto" and possible and hidden.is_cuda)


# The matrix side: which tile, its product, and what takes up its gradient.


def _tiling(hidden, weight, chunk_size, tile_size):
    """Chunks of tokens and tiles of vocabulary, as slices."""
    # A CPU's tile, 16 MB, stays in cache; a GPU's, 128 MB, keeps all its cores in large products.
    chunk, tile, size = (8192, 4096, 2**25) if hidden.is_cuda else (4096, 1024, 2**22)
    n = min(len(hidden), chunk_size or chunk)
    return _slices(len(hidden), max(1, n)), _slices(len(weight), tile_size or max(tile, size // max(1, n)))


def _slices(total, size):
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def _mm(a, b, out, accumulate=False):
    """out = a @ b, or out += a @ b; float32 out of bf16 or fp16 factors is summed in float32."""
    kwargs = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
    if accumulate:
        torch.addmm(out, a, b, out=out, **kwargs)
    else:
        torch.mm(a, b, out=out, **kwargs)


class _Head:
    """hidden @ weight.T, a tile at a time."""

    def __init__(self, hidden, weight, bias):
        self.hidden, self.weight, self.bias, self.buffer = hidden, weight, bias, None
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
        self.sum_dtype = torch.promote_types(dtype, torch.float32)
        # Tensor cores give the float32 sums of bf16 products; a CPU rounds them to bf16, so there it gets float32.
        self.dtype = dtype if hidden.is_cuda else self.sum_dtype

    def tile(self, r, c):
        """The product of a tile, [n, v], and its bias, [v] or None. Overwrites the tile before it."""
        n, v = r.stop - r.start, c.stop - c.start
        if self.buffer is None:  # the first tile is the largest
            self.buffer = torch.empty(n * v, dtype=self.sum_dtype, device=self.hidden.device)
        z = self.buffer[: n * v].view(n, v)
        _mm(self.hidden[r].to(self.dtype), self.weight[c].to(self.dtype).T, z)
        return z, None if self.bias is None else self.bias[c]


class _Grads:
    """Takes up tiles of the logits' gradient: all chunks of tokens for one vocabulary tile, then for the next."""

    def __init__(self, head, needs):
        self.head, (hidden, weight, bias) = head, needs[:3]
        empty = torch.empty_like if len(head.hidden) else torch.zeros_like
        self.hidden = torch.zeros_like(head.hidden, dtype=head.sum_dtype) if hidden else None
        self.weight = empty(head.weight) if weight else None
        self.bias = torch.zeros_like(head.bias, dtype=head.sum_dtype) if bias else None

    def add(self, g, r, c):
        head, first, last = self.head, r.start == 0, r.stop == len(self.head.hidden)
        if self.bias is not None:
            self.bias[c] += g.sum(0, dtype=head.sum_dtype)
        g = g.to(head.dtype)
        if self.hidden is not None:
            _mm(g, head.weight[c].to(head.dtype), self.hidden[r], accumulate=True)
        if self.weight is not None:
            tile = self.weight[c]
            if tile.dtype == head.sum_dtype or (tile.dtype == head.dtype and first and last):
                _mm(g.T, head.hidden[r].to(head.dtype), tile, accumulate=not first)
            else:  # summed over the chunks in float32, rounded once
                if first:
                    self.tile = torch.empty_like(tile, dtype=head.sum_dtype)
                _mm(g.T, head.hidden[r].to(head.dtype), self.tile, accumulate=not first)
                if last:
                    tile.copy_(self.tile)

    def finish(self):
        head = self.head
        return (
            None if self.hidden is None else self.hidden.to(head.hidden.dtype),
            self.weight,
            None if self.bias is None else self.bias.to(head.bias.dtype),
        )


# The autograd side: two loops over tiles each.


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, settings):
        temperature, entropy, fused, rows, cols = settings
        head, kept = _Head(hidden, weight, bias), None
        state = _new_state(hidden, 4)  # [4, N]: m, s, u, z_y
        for c in cols:
            for r in rows:
                z, bias_c = head.tile(r, c)
                if len(rows) == len(cols) == 1 and z.numel() <= KEEP and any(ctx.needs_input_grad):
                    kept = z.clone()
                _absorb(z, bias_c, targets[r] - c.start, state[:, r], temperature, entropy, fused)
        ctx.save_for_backward(hidden, weight, bias, targets, state, kept)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        return _outputs(state, entropy, head.sum_dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logp, grad_entropy):
        hidden, weight, bias, targets, state, kept = ctx.saved_tensors
        temperature, _, fused, rows, cols = ctx.settings
        head = _Head(hidden, weight, bias)
        grads = _Grads(head, ctx.needs_input_grad)
        factors = _factors(state, grad_logp, grad_entropy, temperature, head.sum_dtype)
        for c in cols:
            for r in rows:
                z, bias_c = head.tile(r, c) if kept is None else (kept.clone(), bias)
                g = z if z.dtype == head.dtype else torch.empty_like(z, dtype=head.dtype)
                _gradient(
                    z,
                    g,
                    bias_c,
                    targets[r] - c.start,
                    factors[:, r],
                    temperature,
                    grad_entropy is not None,
                    fused,
                )
                grads.add(g, r, c)
        return *grads.finish(), None, None


class _LogprobsFromLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, settings):
        temperature, entropy, fused, chunk_size, _ = settings
        state = _new_state(logits, 4)
        for r, z in _chunks(logits, chunk_size, fused):
            _absorb(z, None, targets[r], state[:, r], temperature, entropy, fused)
        ctx.save_for_backward(logits, targets, state)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        return _outputs(state, entropy, torch.promote_types(logits.dtype, torch.float32))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logp, grad_entropy):
        logits, targets, state = ctx.saved_tensors
        temperature, _, fused, chunk_size, inplace = ctx.settings
        grad = logits.detach() if inplace else torch.empty_like(logits)
        factors = _factors(
            state, grad_logp, grad_entropy, temperature, torch.promote_types(logits.dtype, torch.float32)
        )
        for r, z in _chunks(logits, chunk_size, fused):
            _gradient(
                z, grad[r], None, targets[r], factors[:, r], temperature, grad_entropy is not None, fused
            )
        return grad, None, None


def _chunks(logits, chunk_size, fused):
    """(slice, logits) of chunks of tokens: float32 copies for torch, which works in place; all as they are for Triton."""
    n = len(logits) if fused else chunk_size or KEEP // logits.shape[1]
    dtype = logits.dtype if fused else torch.promote_types(logits.dtype, torch.float32)
    for r in _slices(len(logits), max(1, n)):
        yield r, logits[r].to(dtype, copy=not fused)


class _LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, ref_hidden, ref_weight, ref_bias, settings):
        temperature, fused, rows, cols = settings
        head, ref = _Head(hidden, weight, bias), _Head(ref_hidden, ref_weight, ref_bias)
        state = _new_state(hidden, 5)  # [5, N]: m, s, d, m', s'
        for c in cols:
            for r in rows:
                _absorb_kl(*head.tile(r, c), *ref.tile(r, c), state[:, r], temperature, fused)
        ctx.save_for_backward(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, state)
        ctx.settings = settings
        _, s, d, _, s_ref = state
        return (d / (1 + s) - s.log1p() + s_ref.log1p()).to(head.sum_dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_kl):
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias, state = ctx.saved_tensors
        temperature, fused, rows, cols = ctx.settings
        head, ref = _Head(hidden, weight, bias), _Head(ref_hidden, ref_weight, ref_bias)
        grads = _Grads(head, ctx.needs_input_grad)
        m, s, d, m_ref, _ = state
        factors = torch.stack((m, m_ref, d / (1 + s), grad_kl / (1 + s) / temperature)).to(head.sum_dtype)
        for c in cols:
            for r in rows:
                z, bias_c = head.tile(r, c)
                g = z if z.dtype == head.dtype else torch.empty_like(z, dtype=head.dtype)
                _gradient_kl(z, bias_c, *ref.tile(r, c), g, factors[:, r], temperature, fused)
                grads.add(g, r, c)
        return *grads.finish(), None, None, None, None


# The token side: what is known of every token, and how a tile of logits z [n, v] adds to it or becomes its gradient.
# targets are indices in the tile; outside of [0, v) the target is not here. Torch's way is to overwrite z.


def _new_state(hidden, k):
    """[k, N], float64, so that adding up tiles adds no error: maxima at LOWEST, sums 0, the target's logit NaN."""
    state = torch.zeros(k, len(hidden), dtype=torch.float64, device=hidden.device)
    state[0] = LOWEST
    state[3] = float("nan") if k == 4 else LOWEST
    return state


def _outputs(state, entropy, dtype):
    m, s, u, z_y = state
    logp = (z_y - m) - s.log1p()
    return logp.to(dtype), (s.log1p() - u / (1 + s)).to(dtype) if entropy else None


def _factors(state, grad_logp, grad_entropy, temperature, dtype):
    """[4, N]: m, f0, f1 and g_y, so that g_j = exp(x) (f0 + f1 x) with x = z_j - m, but g_y for the target."""
    m, s, u, z_y = state
    x_y, total = z_y - m, 1 + s
    logp = x_y - s.log1p()
    f0 = f1 = g_y = torch.zeros_like(m)
    if grad_logp is not None:
        f0, g_y = -grad_logp / total, -grad_logp * logp.expm1()
    if grad_entropy is not None:
        f1, mean = -grad_entropy / total, u / total
        f0, g_y = f0 - f1 * mean, g_y - grad_entropy * logp.exp() * (x_y - mean)
    return torch.stack((m, f0 / temperature, f1 / temperature, g_y / temperature)).to(dtype)


def _finish(z, bias, temperature):
    if bias is not None:
        z += bias
    return z if temperature == 1.0 else z.div_(temperature)


def _locate(targets, v):
    """Which targets are in a tile, and a valid index for all: [n, 1] each."""
    return ((targets >= 0) & (targets < v))[:, None], targets.clamp(0, v - 1)[:, None]


def _without_argmax(z):
    """m and s of a tile [n, v]; z becomes z - m, and exp(z - m) is returned, with 0 at the argmax."""
    top, argmax = z.max(1, keepdim=True)
    e = z.sub_(top.clamp_(min=LOWEST)).exp().scatter_(1, argmax, 0.0)
    return top[:, 0].double(), e.sum(1), e


def _merge(m, top):
    """The larger of two maxima, and by what sums relative to either one shrink."""
    new = torch.maximum(m, top)
    return new, (m - new).exp(), (top - new).exp()


def _absorb(z, bias, targets, state, temperature, entropy, fused):
    """Adds a tile to the (m, s, u, z_y) of its tokens."""
    if fused:
        return _launch(_absorb_kernel, z, bias, targets, state, temperature, ENTROPY=entropy)
    m, s, u, z_y = state
    z = _finish(z, bias, temperature)
    here, index = _locate(targets, z.shape[1])
    z_y.copy_(torch.where(here, z.gather(1, index), z_y[:, None])[:, 0])
    top, s_tile, e = _without_argmax(z)
    new, old, add = _merge(m, top)
    if entropy:
        u_tile = e.mul_(z.clamp_(min=LOWEST)).sum(1)
        u.copy_(old * (u + (m - new) * (1 + s)) + add * (u_tile + (top - new) * (1 + s_tile)))
    s.copy_(old * s + add * s_tile + torch.minimum(old, add))  # the lesser argmax joins the sum
    m.copy_(new)


def _gradient(z, g, bias, targets, factors, temperature, entropy, fused):
    """Writes a tile's gradient to g, which may be z."""
    if fused:
        return _launch(_gradient_kernel, z, bias, targets, factors, temperature, g, ENTROPY=entropy)
    m, f0, f1, g_y = factors[:, :, None]
    x = _finish(z, bias, temperature).sub_(m)
    if entropy:
        e = x.exp()
        x = torch.addcmul(f0, x.clamp_(min=LOWEST), f1, out=x).mul_(e)
    else:
        x.exp_().mul_(f0)
    here, index = _locate(targets, x.shape[1])
    x.scatter_(1, index, torch.where(here, g_y, x.gather(1, index)))
    if g is not x:
        g.copy_(x)


def _absorb_kl(z, bias, z_ref, ref_bias, state, temperature, fused):
    """Adds a tile of policy and reference to the (m, s, d, m', s') of its tokens."""
    m, s, d, m_ref, s_ref = state
    x, x_ref = _finish(z, bias, temperature), _finish(z_ref, ref_bias, temperature)
    top_ref, s_tile_ref, _ = _without_argmax(x_ref)
    top, argmax = x.max(1, keepdim=True)
    e = x.sub_(top.clamp_(min=LOWEST)).exp()
    d_tile = x.clamp_(min=LOWEST).sub_(x_ref.clamp_(min=LOWEST)).mul_(e).sum(1)
    s_tile, top = e.scatter_(1, argmax, 0.0).sum(1), top[:, 0].double()
    new, old, add = _merge(m, top)
    new_ref, old_ref, add_ref = _merge(m_ref, top_ref)
    d_old = d + (1 + s) * ((m - new) - (m_ref - new_ref))
    d_add = d_tile + (1 + s_tile) * ((top - new) - (top_ref - new_ref))
    d.copy_(old * d_old + add * d_add)
    s.copy_(old * s + add * s_tile + torch.minimum(old, add))
    s_ref.copy_(old_ref * s_ref + add_ref * s_tile_ref + torch.minimum(old_ref, add_ref))
    m.copy_(new)
    m_ref.copy_(new_ref)


def _gradient_kl(z, bias, z_ref, ref_bias, g, factors, temperature, fused):
    """Writes a tile's gradient to g, which may be z."""
    m, m_ref, mean, c = factors[:, :, None]
    x = _finish(z, bias, temperature).sub_(m)
    x_ref = _finish(z_ref, ref_bias, temperature).sub_(m_ref)
    e = x.exp().mul_(c)
    x.clamp_(min=LOWEST).sub_(x_ref.clamp_(min=LOWEST)).sub_(mean).mul_(e)
    if g is not x:
        g.copy_(x)
