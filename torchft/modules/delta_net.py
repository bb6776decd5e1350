"""Gated DeltaNet (https://arxiv.org/abs/2412.06464): a mixer with a state instead of keys and values of all tokens.

Shapes: b batch, s sequence, d model dim, h value heads; keys have k channels, values c. Token t turns a head's state S,
[k, c], into  S_t = exp(g_t) S_(t-1) + k_t (beta_t (v_t - k_t^T exp(g_t) S_(t-1)))^T  and reads  q_t^T S_t.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchft.modules.kv_cache import LayerCache
from torchft.modules.masks import Visible
from torchft.modules.norms import RMSNorm

CHUNK = 64  # tokens that are computed in parallel, between two states
EPS = 1e-6  # of the lengths of queries and keys


class GatedDeltaNet(nn.Module):
    """Mixes [b, s, d] -> [b, s, d]: a short causal convolution, the delta rule, a gated norm per head.

    Neither the convolution nor the state sees another document: ``positions`` [b, s] begin at 0 with each. A key head
    serves ``num_heads / num_key_heads`` value heads. ``is_grouped``: the projections' rows are sorted by key head
    (Qwen 3 Next) instead of by what they are (Qwen 3.5).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_key_heads: int,
        *,
        key_dim: int,
        value_dim: int,
        kernel: int,
        norm_eps: float,
        is_grouped: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_key_heads, self.key_dim, self.value_dim = num_heads, num_key_heads, key_dim, value_dim
        self.is_grouped = is_grouped
        keys, values = num_key_heads * key_dim, num_heads * value_dim
        if is_grouped:
            self.in_proj_qkvz = nn.Linear(dim, 2 * keys + 2 * values, bias=False)
            self.in_proj_ba = nn.Linear(dim, 2 * num_heads, bias=False)
        else:
            self.in_proj_qkv = nn.Linear(dim, 2 * keys + values, bias=False)
            self.in_proj_z = nn.Linear(dim, values, bias=False)
            self.in_proj_b = nn.Linear(dim, num_heads, bias=False)
            self.in_proj_a = nn.Linear(dim, num_heads, bias=False)
        self.conv1d = nn.Conv1d(2 * keys + values, 2 * keys + values, kernel, groups=2 * keys + values, bias=False)
        self.dt_bias = nn.Parameter(torch.ones(num_heads))
        self.A_log = nn.Parameter(torch.empty(num_heads).uniform_(1, 16).log())
        self.norm = RMSNorm(value_dim, norm_eps)
        self.out_proj = nn.Linear(values, dim, bias=False)

    def forward(
        self,
        x: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        seen: Visible,
        cache: LayerCache | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """A ``cache`` keeps what the convolution takes and the gates, of each slot, and the state behind a prefill of
        known lengths, from which single tokens go on; without one it is made again from all slots. So rows may be
        padded behind their ends, and continue at different ``positions``."""
        assert positions is not None
        b, s, _ = x.shape
        qkv, z, beta, a = self._project(x)
        where, gates, weight = positions, torch.cat((beta, a), dim=-1), self.conv1d.weight[:, 0]
        if cache is not None:
            held = cache.update(positions, qkv[:, :, None], gates[:, :, None])
            qkv, gates = (y[:, : cache.seen, 0] for y in held)
            where = torch.arange(qkv.shape[1], device=x.device).expand(b, -1)  # of slots, all of one document
        rows, own = torch.arange(b, device=x.device)[:, None], positions.clamp(max=qkv.shape[1] - 1)
        # idle rows may stand further than what is seen; nobody reads what they give
        if cache is not None and cache.state is not None and s == 1:
            taps = own - torch.arange(weight.shape[1] - 1, -1, -1, device=x.device)  # slots, [b, taps]
            before = torch.where((taps >= 0)[..., None], qkv[rows, taps.clamp(min=0)], 0)
            mixed = F.silu((before * weight.T).sum(1, keepdim=True))  # [b, 1, channels]
            last = cache.state[rows[:, 0], (positions[:, 0] - 1) % 2]
            q, k, v, decay, beta = (y[:, 0] for y in self._gated(mixed, gates[rows, own]))
            out, state = delta_step(q, k, v, decay, beta, last)
            cache.state[rows[:, 0], positions[:, 0] % 2] = state
            out = out[:, None]  # [b, 1, h, c]
        else:
            q, k, v, decay, beta = self._gated(F.silu(causal_conv(qkv, weight, where)), gates)
            if cache is not None and cache.lengths is not None:  # padding neither decays the state nor writes to it
                is_padding = (where >= cache.lengths[:, None])[..., None]
                decay, beta = decay.masked_fill(is_padding, 0.0), beta.masked_fill(is_padding, 0.0)
            out, state = delta_rule_and_state(q, k, v, decay, beta, where)  # [b, t, h, c]
            if cache is not None:
                cache.state = None if cache.lengths is None else state
                out = out[rows, own]
        out = self.norm(out.to(x.dtype)) * F.silu(z.float())
        return self.out_proj(out.to(x.dtype).flatten(2))

    def _gated(self, mixed: Tensor, gates: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Queries (scaled) and keys [b, t, h, k], values [b, t, h, c], log decay and beta [b, t, h], all fp32, of what
        the convolution and the gates' projections gave."""
        beta, a = gates.chunk(2, dim=-1)
        keys = self.num_key_heads * self.key_dim
        q, k, v = mixed.split((keys, keys, self.num_heads * self.value_dim), dim=-1)
        q, k = (self._heads(y) for y in (q, k))  # of length 1
        decay = -self.A_log.float().exp() * F.softplus(a.float() + self.dt_bias.float())
        v = v.unflatten(-1, (self.num_heads, -1)).float()
        return q / math.sqrt(self.key_dim), k, v, decay, beta.float().sigmoid()

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys and values side by side [b, s, ...], output gates [b, s, h, c], betas and decays [b, s, h]."""
        if not self.is_grouped:
            z = self.in_proj_z(x).unflatten(-1, (self.num_heads, -1))
            return self.in_proj_qkv(x), z, self.in_proj_b(x), self.in_proj_a(x)
        share = self.num_heads // self.num_key_heads  # value heads of a key head
        values = share * self.value_dim
        qkvz = self.in_proj_qkvz(x).unflatten(-1, (self.num_key_heads, -1))
        q, k, v, z = qkvz.split((self.key_dim, self.key_dim, values, values), dim=-1)
        beta, a = self.in_proj_ba(x).unflatten(-1, (self.num_key_heads, -1)).split((share, share), dim=-1)
        qkv = torch.cat([y.flatten(2) for y in (q, k, v)], dim=-1)
        return qkv, z.flatten(2).unflatten(-1, (self.num_heads, -1)), beta.flatten(2), a.flatten(2)

    def _heads(self, x: Tensor) -> Tensor:
        """Queries or keys of the key heads -> of all heads, of length 1: [b, t, h, k] fp32."""
        x = x.unflatten(-1, (self.num_key_heads, -1)).float()
        x = x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPS)
        return x.repeat_interleave(self.num_heads // self.num_key_heads, dim=2)


def causal_conv(x: Tensor, weight: Tensor, positions: Tensor) -> Tensor:
    """Each channel's own filter, ``weight`` [channels, taps], over the tokens of x [b, s, channels] up to each one, of
    its document; the last tap is the token's own."""
    taps = weight.shape[1]
    out = x * weight[:, -1]
    for back in range(1, min(taps, x.shape[1])):
        before = F.pad(x[:, :-back], (0, 0, back, 0))
        out = out + torch.where((positions >= back)[..., None], before, 0) * weight[:, taps - 1 - back]
    return out


def delta_step(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """What one token reads, [b, h, c], and the state behind it, [b, h, k, c]; of q, k [b, h, k], v [b, h, c], log decay
    and beta [b, h], all fp32."""
    state = state * decay.exp()[..., None, None]
    new = (v - (k[..., None, :] @ state)[..., 0, :]) * beta[..., None]
    state = state + k[..., None] * new[..., None, :]
    return (q[..., None, :] @ state)[..., 0, :], state


def delta_rule(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, positions: Tensor) -> Tensor:
    """What `delta_rule_and_state` reads."""
    return delta_rule_and_state(q, k, v, decay, beta, positions)[0]


def delta_rule_and_state(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """The gated delta rule from an empty state at every position 0: [b, s, h, c], and the last state, [b, h, k, c].

    q, k [b, s, h, k], v [b, s, h, c], ``decay`` (its log, not over 0) and ``beta`` [b, s, h], all fp32. In chunks: what
    the tokens of one do to each other is a triangular system, and the state passes from one to the next.
    """
    s, chunk = q.shape[1], min(CHUNK, q.shape[1])
    pad = -s % chunk
    starts = F.pad(positions == 0, (0, pad))[:, None].unflatten(-1, (-1, chunk))  # [b, 1, n, i]
    q, k, v = (F.pad(x.transpose(1, 2), (0, 0, 0, pad)).unflatten(2, (-1, chunk)) for x in (q, k, v))  # [b, h, n, i, .]
    decay, beta = (F.pad(x.transpose(1, 2), (0, pad)).unflatten(2, (-1, chunk)) for x in (decay, beta))  # [b, h, n, i]

    document = starts.cumsum(-1)  # [b, 1, n, i], counted within the chunk; 0: one that began before it
    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()
    together = causal & (document[..., :, None] == document[..., None, :])  # [b, 1, n, i, j]
    total = decay.cumsum(-1)
    between = (total[..., :, None] - total[..., None, :]).masked_fill(~together, float("-inf")).exp()
    from_state = total.exp() * (document == 0)  # what is left of the state before the chunk, at each token
    to_state = (total[..., -1:] - total).exp() * (document == document[..., -1:])  # and of each token, behind it

    weighted = k * beta[..., None]
    system = (weighted @ k.mT) * between
    known = torch.cat((v * beta[..., None], weighted * from_state[..., None]), dim=-1)
    solved = torch.linalg.solve_triangular(system, known, upper=False, unitriangular=True)
    writes, corrections = solved.split((v.shape[-1], k.shape[-1]), dim=-1)
    within = (q @ k.mT) * between
    reads, adds = q * from_state[..., None], (k * to_state[..., None]).mT

    state = q.new_zeros(*q.shape[:2], k.shape[-1], v.shape[-1])
    outputs = []
    for i in range(q.shape[2]):
        new = writes[:, :, i] - corrections[:, :, i] @ state
        outputs.append(reads[:, :, i] @ state + within[:, :, i] @ new)
        state = state * from_state[:, :, i, -1:, None] + adds[:, :, i] @ new
    return torch.cat(outputs, dim=2)[:, :, :s].transpose(1, 2), state
