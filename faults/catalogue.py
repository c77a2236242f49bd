"""The faults: what is wrong, where, and which laws must notice."""

from faults.plant import Fault

VALUES, GRADIENTS = "values_are_the_oracles", "gradients_are_the_oracles"
ANY_LENGTH = "the_chunked_form_is_the_recurrence_for_any_length"
TAIL = "the_state_after_a_tail_is_that_of_the_definition"
ENDS = "gates_at_the_ends_of_their_ranges_are_harmless"
FLAT = "rows_without_variance_are_harmless"
NUMBERS = "any_small_numbers_give_the_oracles_results"
LONG = "long_sequences_of_a_plain_memory_are_the_recurrence"
EVERY_CHUNK = "every_chunk_is_right_from_the_oracles_own_state"
LONG_CHUNKS = "the_chunked_form_is_the_recurrence_for_long_chunks"
SHORT_CHUNKS = "the_chunked_form_is_the_recurrence_for_short_chunks"
COEFFICIENTS = "every_coefficient_has_a_few_roundings"
SPLIT, SINGLE, STEP = (
    "splitting_a_sequence_changes_nothing",
    "splitting_into_single_tokens_changes_nothing",
    "decoding_step_by_step_changes_nothing",
)
PACKED = "packed_sequences_are_separate"
PERMUTED, ALONE = (
    "permuting_sequences_and_heads_permutes_the_results",
    "a_sequence_alone_gives_what_it_gives_in_a_batch",
)
SAME, LAYOUT = "the_same_input_gives_the_same_bits", "any_layout_gives_the_same_bits_and_nothing_is_modified"
FRESH = "results_do_not_depend_on_uninitialised_memory"
INTEGERS = "small_integers_give_exactly_the_oracles_values"
PAPER = "chunks_of_one_token_are_the_papers_recurrence"
UNTAUGHT = "without_learning_the_memory_only_decays"
RAISED = "gates_are_raised_before_anything_else"
LOGS = "logs_of_0_and_1_give_what_0_and_1_give"
LOG_ZERO = "a_gate_of_exactly_zero_has_no_derivative_by_its_log"
FINITE, ZERO_GATES = "finite_inputs_give_finite_results", "gates_of_zero_give_finite_gradients"
HIDDEN, HUGE = "what_is_not_finite_is_not_hidden", "huge_later_tokens_harm_nothing_earlier"
HUGE_VALUES = "huge_later_values_harm_no_earlier_gradient"


def fault(name: str, module: str, old: str, new: str, *laws: str, backend: str = "chunk") -> Fault:
    """Write a fault of one change."""
    return Fault(name, module, ((old, new),), laws, backend)


ANCHOR = (
    fault("anchor refreshed one token late", "recurrent", "offset + t + 1)", "offset + t)", VALUES, SPLIT,
          backend="recurrent"),
    fault("anchor refreshed one token early", "recurrent", "offset + t + 1)", "offset + t + 2)", VALUES, SPLIT,
          backend="recurrent"),
    fault("anchor never refreshed", "chunk", "A[live] = M[live]", "A[live] = A[live]", VALUES, ANY_LENGTH),
    fault("anchor taken from S", "chunk", "A[live] = M[live]", "A[live] = S[live]", VALUES, ANY_LENGTH),
    fault("no anchor: the gradient is taken at M", "recurrent", "k_t @ anchor", "k_t @ M", VALUES, ANY_LENGTH,
          backend="recurrent"),
    fault("final anchor not refreshed", "chunk", "torch.where(x.pieces.refreshed[:, None, None, None], M, A)", "A",
          VALUES, SPLIT),
    fault("anchor of a resumed chunk taken from M", "api", "S.to(dtype), anchor.to(dtype), offset",
          "S.to(dtype), M.to(dtype), offset", VALUES, SPLIT),
    fault("backward at M0 instead of the anchor", "chunk", "dy @ A[now].mT", "dy @ M0[now].mT", GRADIENTS, SPLIT),
)  # fmt: skip

STATES = (
    fault("momentum dropped where a chunk ends", "chunk", "A[live] = M[live]", "A[live] = M[live]; S[live] = 0",
          VALUES, ANY_LENGTH),
    fault("momentum dropped at a split", "api", "return M.to(dtype), S.to(dtype),",
          "return M.to(dtype), torch.zeros_like(S),", VALUES, SPLIT),
    fault("momentum decays with the memory", "recurrent", "M = a_t * M + S", "M = a_t * (M + S)", VALUES, PAPER,
          backend="recurrent"),
    fault("offset ignored at resume", "partition",
          "torch.zeros_like(lengths) if offset is None else offset.cpu().long()",
          "torch.zeros_like(lengths)", VALUES, SPLIT),
    fault("final offset counted from zero", "partition", "return (call.offset + T) % call.chunk_size",
          "return (0 * call.offset + T) % call.chunk_size", VALUES, SPLIT),
    fault("a step has the default chunk length", "api", "offset, None, eps, chunk_size, log_gates",
          "offset, None, eps, 16, log_gates", STEP),
    fault("initial state changed in place", "chunk", "M, S, A = M[order], S[order],", "M, S, A = M[order], S,", LAYOUT),
    fault("heads and sequences of a state swapped", "api", "return M.to(dtype), S.to(dtype),",
          "return M.to(dtype).transpose(0, 1).reshape(M.shape), S.to(dtype),", PERMUTED, ALONE),
    fault("state kept in bfloat16", "chunk", "f * S[live] + k_T @ (G * u[now])",
          "f * S[live] + (k_T @ (G * u[now])).bfloat16().to(M.dtype)", VALUES, TAIL),
)  # fmt: skip

FACTORS = (
    fault("factor 2 missing in the output", "chunk", "- 2 * (weights @ u)", "- (weights @ u)", VALUES, PAPER),
    fault("factor 2 missing in the state", "chunk", "k_T = -2 * x.k[now].mT", "k_T = -x.k[now].mT", VALUES, PAPER),
    fault("factor 2 missing in the gradient for u", "chunk", "grad.u[now] - 2 * (G * k_dM", "grad.u[now] - (G * k_dM",
          GRADIENTS, NUMBERS),
    fault("factor 2 missing in the gradient for theta", "chunk", "-2 * (k_dM * u_now).sum(-1)",
          "-(k_dM * u_now).sum(-1)", GRADIENTS, NUMBERS),
)  # fmt: skip

VJP = "return r * (e - mean(e) - x * mean(e * x))"
VARIANCE = "r = (mean(centred * centred) + eps).rsqrt()"
NORM = (
    fault("LayerNorm vjp of fla: first term not divided by D", "inner", VJP,
          "return r * (e * e.shape[-1] - mean(e) - x * mean(e * x))", VALUES, NUMBERS),
    fault("LayerNorm vjp: r times the first term alone", "inner", VJP, "return r * e - mean(e) - x * mean(e * x)",
          VALUES, NUMBERS),
    fault("LayerNorm vjp: r times all but the last term", "inner", VJP, "return r * (e - mean(e)) - x * mean(e * x)",
          VALUES, ANY_LENGTH),
    fault("LayerNorm vjp: product outside the mean", "inner", VJP, "return r * (e - mean(e) - x * x * mean(e))",
          VALUES, ANY_LENGTH),
    fault("variance over D - 1", "inner", VARIANCE,
          "r = ((centred * centred).sum(-1, keepdim=True) / max(y.shape[-1] - 1, 1) + eps).rsqrt()", VALUES,
          ANY_LENGTH),
    fault("eps outside the square root", "inner", VARIANCE, "r = 1 / (mean(centred * centred).sqrt() + eps)", VALUES,
          FLAT),
    fault("eps left out", "inner", VARIANCE, "r = mean(centred * centred).rsqrt()", VALUES, FLAT),
    fault("residual v instead of v - k", "inner", "return v if w is None else v - k", "return v", VALUES, NUMBERS),
    fault("readout without its residual", "inner", "return y + norm(y, eps)[0] * w + b",
          "return norm(y, eps)[0] * w + b", VALUES, NUMBERS),
    fault("second derivative of r with one r", "inner", "(r * r * dr / D)", "(r * dr / D)", GRADIENTS, ANY_LENGTH),
    fault("k forgotten as a target", "chunk", "grad.k if x.w is None else grad.k - dtarget", "grad.k", GRADIENTS,
          NUMBERS),
    fault("gradient of w summed over all heads", "chunk", "(do * y_normed).sum((0, 2))",
          "(do * y_normed).sum((0, 1, 2)).expand(do.shape[1], -1)", GRADIENTS, PERMUTED),
)  # fmt: skip

ENDING = "(length - 1).to(device)"
TAILS = (
    fault("tail: m taken at C", "coefficients", "G[..., 1], n[..., 1])", "G[..., 1], self.n[-1, ..., 1])", VALUES,
          TAIL),
    fault("tail: f taken at the token before", "coefficients", "G[..., 1], n[..., 1])",
          "self.G[token, at[1], ..., 1], n[..., 1])", VALUES, TAIL),
    fault("tail: everything taken at C", "partition", ENDING, "(0 * length + token.shape[1] - 1).to(device)",
          VALUES, TAIL),
    Fault("tail: padding with real gates", "partition",
          ((ENDING, "(0 * length + token.shape[1] - 1).to(device)"), ("pieces[self.padding] = 0", "pass")),
          (VALUES, TAIL)),
    fault("tail: gradients put at C", "chunk", "at = (x.pieces.end[now] + 1,",
          "at = (0 * x.pieces.end[now] + x.k.shape[2],", GRADIENTS, TAIL),
    fault("last row of a tail not written", "partition",
          "x.flatten(0, 1)[self.index[~self.padding]] = tokens[~self.padding]",
          "x.flatten(0, 1)[self.index[~self.padding][:-1]] = tokens[~self.padding][:-1]", VALUES, FRESH),
)  # fmt: skip

TRANSITION = "torch.addcmul(n[t + 1, ..., now], G[t, ..., now], a[..., t, None], out=G[t + 1, ..., now])"
LOG_SUM = "torch.logaddexp(log_aG, log_n[t + 1, ..., now], out=log_G[t + 1, ..., now])"
DECAYS = (
    fault("G without its diagonal", "chunk", "weights = (x.q @ x.k.mT).tril()", "weights = (x.q @ x.k.mT).tril(-1)",
          VALUES, COEFFICIENTS),
    fault("n in the place of G", "coefficients", "return self.G[1:, ..., 2:]", "return self.n[1:, ..., 2:]", VALUES,
          COEFFICIENTS),
    fault("f off by one", "coefficients", "return self.G[1:, ..., 1]", "return self.G[:-1, ..., 1]", VALUES,
          COEFFICIENTS),
    fault("beta off by one", "coefficients", "return self.G[1:, ..., 0]", "return self.G[:-1, ..., 0]", VALUES,
          UNTAUGHT),
    fault("exp(-alpha) for 1 - alpha", "gates", "return theta, 1 - alpha, eta", "return theta, (-alpha).exp(), eta",
          VALUES, COEFFICIENTS),
    fault("ratios of products", "coefficients", TRANSITION, TRANSITION.replace(
          "a[..., t, None]", "(a.cumprod(-1)[..., t] / a[..., :t].prod(-1))[..., None]"), VALUES, ENDS),
    fault("log of a sum without care for log 0", "coefficients", LOG_SUM,
          "log_G[t + 1, ..., now] = log_aG + torch.log1p((log_n[t + 1, ..., now] - log_aG).exp())", VALUES, ENDS,
          backend="log"),
    fault("differences of prefix sums", "coefficients", "log_eta[..., t, None], out=",
          "(log_eta[..., : t + 1].sum(-1) - log_eta[..., :t].sum(-1))[..., None], out=", VALUES, COEFFICIENTS,
          backend="log"),
    fault("exponent clamped", "coefficients", "Coefficients(log_n.exp_(), log_G.exp_())",
          "Coefficients(log_n.clamp_(-60).exp_(), log_G.clamp_(-60).exp_())", VALUES, COEFFICIENTS, backend="log"),
    fault("coefficients flushed early", "coefficients", "return Coefficients(n, G)",
          "return Coefficients(n, G * (G >= 2**24 * torch.finfo(G.dtype).tiny))", COEFFICIENTS),
    fault("gates flushed early", "coefficients", "n[t + 1, ..., t + 2] = theta[..., t]",
          "n[t + 1, ..., t + 2] = theta[..., t] * (theta[..., t] >= 2**24 * torch.finfo(theta.dtype).tiny)",
          COEFFICIENTS),
    fault("gate gradient divides by the gate", "coefficients", "deta = (dn[1:] * c.n[:-1]).sum(-1)",
          "deta = (dn[1:, ..., :-1] * c.n[1:, ..., :-1]).sum(-1) / eta.permute(2, 0, 1)",
          GRADIENTS, ENDS),
    fault("gate gradient without the state's term in beta", "chunk", "torch.cat([dbeta[..., None],",
          "torch.cat([0 * dbeta[..., None],", GRADIENTS, TAIL),
    fault("gate gradient without the state's term in m", "chunk", "torch.cat([torch.zeros_like(dm[..., None]), dm[",
          "torch.cat([torch.zeros_like(dm[..., None]), 0 * dm[", GRADIENTS, TAIL),
    fault("sign of the gradient for alpha", "gates", "return dtheta, -da, deta", "return dtheta, da, deta", GRADIENTS,
          NUMBERS),
    fault("derivative by the gate instead of its log", "gates", "return theta * dtheta, a * da, eta * deta",
          "return dtheta, da, deta", GRADIENTS, LOG_ZERO),
)  # fmt: skip

TRUNCATED = "(x.q.float().view(torch.int32) & -8192).view(torch.float32).to(x.q.dtype)"
PRECISION = (
    fault("gates rounded to the dtype of q", "chunk", "passed = pieces.gather(call.theta).to(dtype),",
          "passed = pieces.gather(call.theta).to(call.q.dtype).to(dtype),", VALUES, GRADIENTS),
    fault("gates not raised", "recurrent", "call.theta.to(dtype), call.alpha.to(dtype), call.eta.to(dtype)",
          "call.theta, call.alpha, call.eta", VALUES, RAISED, backend="recurrent"),
    fault("gates kept in half precision", "coefficients", "n[t + 1, ..., t + 2] = theta[..., t]",
          "n[t + 1, ..., t + 2] = theta[..., t].bfloat16()", VALUES, COEFFICIENTS),
    fault("tf32 where float32 is promised", "chunk", "weights = (x.q @ x.k.mT)", f"weights = ({TRUNCATED} @ x.k.mT)",
          VALUES, LONG),
    fault("a sum in float16", "inner", "return x.mean(-1, keepdim=True)",
          "return x.half().mean(-1, keepdim=True).to(x.dtype)", VALUES, ANY_LENGTH),
)  # fmt: skip

SHUFFLED = "__import__('random').sample(range(k_T.shape[-1]), k_T.shape[-1])"
CALLS = (
    fault("packed sequences read on into the next", "partition",
          "torch.minimum(room[sequence] + step * chunk_size, lengths[sequence])",
          "torch.minimum(room[sequence] + step * chunk_size, B * T - starts[sequence])", PACKED, VALUES),
    fault("an empty sequence shifts the states", "recurrent", "slice(n, n + 1))",
          "slice(m := max(len(set(bounds[: n + 1])) - 1, 0), m + 1))", PACKED, VALUES, backend="recurrent"),
    fault("heads and tokens not transposed", "partition", "return pieces.transpose(1, 2).contiguous()",
          "return pieces.reshape(pieces.shape[0], pieces.shape[2], -1, *pieces.shape[3:])", VALUES, PERMUTED),
    fault("offsets wrap around", "partition", "torch.where(padding, 0, starts[sequence, None] + token)",
          "torch.where(padding, 0, (starts[sequence, None] + token) % 32)", VALUES, GRADIENTS),
    fault("an input changed in place", "api", "    M, S, anchor, offset = _initial_state(initial_state, N, q)",
          "    alpha.detach().clamp_(max=1 - 2**-11)\n"
          "    M, S, anchor, offset = _initial_state(initial_state, N, q)", LAYOUT, VALUES),
    fault("sum in another order each time", "chunk", "f * S[live] + k_T @ (G * u[now])",
          f"f * S[live] + (lambda p: k_T[..., p] @ (G * u[now])[..., p, :])({SHUFFLED})", SAME, FRESH),
    fault("strides choose the rounding", "arguments", "x.contiguous() if isinstance(x, Tensor) else x",
          "x if not isinstance(x, Tensor) or x.is_contiguous() else (x / 1.1 * 1.1).to(x.dtype)", LAYOUT),
    fault("learning rate averaged over the batch", "chunk", "theta, a, eta = linear_gates(passed, call.log_gates)",
          "theta, a, eta = linear_gates(passed, call.log_gates); theta = theta / B", ALONE, VALUES),
    fault("NaN hidden", "chunk", "return x.pieces.scatter(o, call.q), M",
          "return x.pieces.scatter(o.nan_to_num(), call.q), M", HIDDEN),
    fault("cotangent of the final S ignored", "chunk", "dM + danchor, dM)[order], dS[order],",
          "dM + danchor, dM)[order], 0 * dS[order],", GRADIENTS, SPLIT),
    fault("cotangent of a fresh final anchor ignored", "chunk", "torch.where(refreshed, dM + danchor, dM)[order]",
          "dM[order]", GRADIENTS, SPLIT),
    fault("dS_0 dropped for T < C", "chunk", "return dtarget, dw, db, dM[back], dS[back],",
          "return dtarget, dw, db, dM[back], dS[back] * (len(x.pieces.steps) > 1),", GRADIENTS, SPLIT),
    fault("dM_0 dropped for T < C", "chunk", "return dtarget, dw, db, dM[back],",
          "return dtarget, dw, db, dM[back] * (len(x.pieces.steps) > 1),", GRADIENTS, SPLIT),
    fault("what is above the diagonal overflows, forward", "chunk", "weights = (x.q @ x.k.mT).tril()",
          "weights = (x.q @ x.k.mT)", HUGE),
    fault("what is above the diagonal overflows, scores backward", "chunk", "scores = (x.q @ x.k.mT).tril()  #",
          "scores = (x.q @ x.k.mT)  #", HUGE),
    fault("what is above the diagonal overflows, weights backward", "chunk", "dweights = -2 * (dy @ u.mT).tril()",
          "dweights = -2 * (dy @ u.mT)", HUGE_VALUES),
)  # fmt: skip


def kernel(name: str, module: str, old: str, new: str, *laws: str) -> Fault:
    """Write a fault of one change of a Triton kernel, for the interpreter."""
    return fault(f"kernels: {name}", f"kernels.{module}", old, new, *laws, backend="triton")


ABOVE = "tl.dot({}, tl.trans({}), input_precision=PREC)"
KERNELS = (
    kernel("momentum not handed on", "state", "m_L * S,", "0.0 * S,", SHORT_CHUNKS, ANY_LENGTH),
    kernel("G in the place of n, backward", "state_vjp", "2 * n_L * tl.dot(k, dS.to(", "2 * G_L * tl.dot(k, dS.to(",
           SHORT_CHUNKS, SPLIT),
    kernel("anchor refreshed inside a chunk of several blocks", "state",
           "A = tl.where((i + 1) % tile.NB == 0, M.to(tile.OP), A)", "A = M.to(tile.OP)", LONG_CHUNKS),
    kernel("gradient at the block's memory instead of its chunk's", "state_vjp",
           "block.sequence.slot + block.i // tile.NB * tile.NB", "block.sequence.slot + block.i", LONG_CHUNKS),
    kernel("cotangent of an unfinished chunk's anchor dropped", "state_vjp",
           "dA += load_square(dfinal.anchor, pid, tile, tl.float32)", "dA += 0.0", SHORT_CHUNKS, TAIL),
    kernel("cotangent of the anchor dropped where its chunk begins in a block", "state_vjp",
           "(s > 0) & unfinished", "(s > 0) & (sequence.length < 0)", SHORT_CHUNKS, TAIL),
    kernel("decays of the block's first chunk for all of them", "state", "(step.index * PER + step.sub) * 3",
           "step.index * PER * 3", VALUES, SHORT_CHUNKS),
    kernel("decays of a resumed block's chunks in the wrong place", "coefficients",
           "(tl.where(block.i == 0, block.sequence.offset, 0) + t) // C", "t // C", SHORT_CHUNKS),
    kernel("momentum of the block for that of its chunk", "coefficients", "f_c = a_t * f_c + m_c",
           "f_c = a_t * f_c + m", VALUES, SHORT_CHUNKS),
    kernel("coefficients of (20) in the row that reads", "state_vjp", "at = block.index * 2 * BC + start - 1",
           "at = block.index * 2 * BC + offs_t", SHORT_CHUNKS),
    kernel("G without its diagonal", "output", "(offs_t < block.length) & (offs_j <= offs_t)",
           "(offs_t < block.length) & (offs_j < offs_t)", VALUES, ANY_LENGTH),
    kernel("rows of G after a tail not masked", "output", "(offs_t < block.length) & (offs_j <= offs_t)",
           "offs_j <= offs_t", FRESH),
    kernel("last row of a block not written", "output", "store_rows(o_ptr, y, block, BC, tile)",
           "store_rows(o_ptr, y, block._replace(length=block.length - 1), BC, tile)", VALUES, FRESH),
    kernel("packed sequences share slots", "block", "(begin + n.to(tl.int64) * slack) // width", "begin // width",
           PACKED),
    kernel("mean over the padded width", "inner", "return (tl.sum(x, 1) / tile.D)[:, None]",
           "return (tl.sum(x, 1) / x.shape[1])[:, None]", EVERY_CHUNK, FLAT),
    kernel("float32 promised, the dtype of q stored", "tile",
           "return torch.bfloat16 if call.q.dtype == torch.bfloat16 else torch.float32", "return call.q.dtype",
           GRADIENTS),
    kernel("what is above the diagonal overflows, weights backward", "output",
           f"lower({ABOVE.format('dy_op', 'u')}, BC)", ABOVE.format("dy_op", "u"), HUGE_VALUES),
    kernel("what is above the diagonal overflows, anchors backward", "state_vjp",
           f"tl.where(before, {ABOVE.format('dy', 'u')}, 0.0)", ABOVE.format("dy", "u"), HUGE_VALUES),
    kernel("a step refreshes the anchor one token late", "step", "(offset + 1) % C == 0, M, A",
           "(offset + C) % C == 0, M, A", STEP),
)  # fmt: skip

FAULTS = (*ANCHOR, *STATES, *FACTORS, *NORM, *TAILS, *DECAYS, *PRECISION, *CALLS, *KERNELS)
