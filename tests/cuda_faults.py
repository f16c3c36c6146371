"""Faults for ``test_cuda_faults``: changes of one place of the kernels."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .emulation import PLUGIN


@dataclass(frozen=True)
class Fault:
    """The ``nth`` occurrence (from 0) of ``old`` in a file becomes ``new``."""

    file: str
    old: str
    new: str
    nth: int = 0

    def applied(self, text: str) -> str:
        at = -1
        for _ in range(self.nth + 1):
            at = text.index(self.old, at + 1)
        return text[:at] + self.new + text[at + len(self.old) :]


#: The kernel of decode steps.
DECODE = (
    "decode_block.cuh",
    "decode_logits.cuh",
    "decode_tiles.cuh",
    "decode_merge.cuh",
    "decode_settle.cuh",
    "decode.cuh",
)
#: Those of prefill that read or write the state.
PREFILL = ("attend.cuh", "turn.cuh", "score.cuh", "select.cuh", "settle.cuh")
#: What only the decode kernel of float32 models has.
FLOAT32 = ("decode_attend.cuh", "slots.cuh")


#: What only short chunks have.
SHORT = "short_chunk.cuh"


def waits(files: tuple[str, ...] = (*DECODE, *FLOAT32, "tiles.cuh", *PREFILL)) -> dict[str, Fault]:
    """Every barrier and every wait for a copy of these files, removed."""
    faults = {}
    for file in files:
        text = (PLUGIN / "src" / file).read_text()
        for old in ("__syncthreads();", "awaitCopies<0>();", "awaitCopies<2>();"):
            for nth, match in enumerate(re.finditer(re.escape(old), text)):
                line = text.count("\n", 0, match.start()) + 1
                faults[f"{file}:{line} without {old[:-3]}"] = Fault(file, old, ";", nth)
    return faults


def row_faults() -> dict[str, Fault]:
    """Every use of a row of the state that is that of the step instead.

    But for those that only float32 has, which the small builds of these tests lack, and for prefetches, which change no
    result (``test_cuda_prefetch.py``).
    """
    faults = {}
    for file in ("decode_block.cuh", "decode_merge.cuh", "decode_settle.cuh", *PREFILL):
        text = (PLUGIN / "src" / file).read_text()
        for nth, match in enumerate(re.finditer("stateHead", text)):
            number = text.count("\n", 0, match.start())
            declared = re.match(r"stateHead(Of\(|\(stateHeadOf|;| =|, int n)", text[match.start() :])
            float32 = re.search(r"const codes =|readCodes<W, kTileRows>", text.splitlines()[number])
            prefetched = text.splitlines()[number].lstrip().startswith("ask(")
            if not (declared or float32 or prefetched):
                faults[f"{file}:{number + 1} ({nth}) with the row of the step"] = Fault(file, "stateHead", "head", nth)
    return faults


FAULTS = {
    "decode: maximum not rescaled": Fault("decode_tiles.cuh", "mass[octet] *= shrink;", ";"),
    "decode: accumulator not rescaled": Fault("decode_tiles.cuh", "sums[octet][n][e] *= shrink;", ";"),
    "decode: maximum of two lanes": Fault(
        "decode_tiles.cuh",
        "top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));",
        ";",
    ),
    "decode: a split goes on into the next": Fault(
        "decode_tiles.cuh", "clear();\n                for", "if (tile == 0) clear();\n                for"
    ),
    "decode: slots beyond the last are seen": Fault(
        "decode_logits.cuh", "{row < end - base, row + 1 <", "{true, row + 1 <"
    ),
    "decode: parts of queries that do not exist": Fault(
        "decode_logits.cuh", "scratch.none[x] = fromFloat<Key>(0.f);", "scratch.none[x] = fromFloat<Key>(1.f);"
    ),
    "decode: mass of one lane": Fault("decode_tiles.cuh", "mass[octet] += __shfl_xor_sync(~0u, mass[octet], 2);", ";"),
    "decode: every stage is the first": Fault("tiles.cuh", "stage + 1 < stages_ ? stage + 1 : 0", "0 * stage"),
    "decode: low-rank term without its maximum": Fault(
        "decode_merge.cuh", "float const all = fmaxf(exact, low);", "float const all = exact;"
    ),
    "decode: victim not absorbed": Fault(
        "decode_settle.cuh", "sum = {sum.x + psi *", "float4 const lost = {sum.x + psi *"
    ),
    "decode: z forgets the victim": Fault("decode_settle.cuh", "means.z[r] += psi;", ";"),
    "decode: new token one slot off": Fault(
        "decode_settle.cuh",
        "{min(choice.free, victim), victim,",
        "{min(choice.free, victim) == 0 ? 1 : min(choice.free, victim) - 1, victim,",
    ),
    "decode: ties evict the lower index": Fault(
        "decode_settle.cuh", "(0xffffffffu - static_cast<unsigned>(c)));", "static_cast<unsigned>(c));"
    ),
    "decode: parked row goes on": Fault(
        "decode.cuh", "if (block.p.t.newLength[blockIdx.z] > 0)", "if (block.p.t.newLength[blockIdx.z] >= 0)"
    ),
    "decode: values of empty slots not dropped": Fault(
        "decode_slots.cuh", "if (keys.position(firstRow() + rows) < 0)", "if (false)"
    ),
    "rules: causal bound one too far": Fault("rules.cuh", "&& position <= now;", "&& position <= now + 1;"),
    "rules: causal bound one too near": Fault("rules.cuh", "&& position <= now;", "&& position < now;"),
    "rules: window one too wide": Fault("rules.cuh", "max(-1, now - rules.window)", "max(-1, now - rules.window - 1)"),
    "rules: compressed window without grace": Fault("rules.cuh", "kWindow ? 0 : 1", "kWindow ? 0 : 0"),
    "rules: recent one too many": Fault(
        "rules.cuh", "position >= end - rules.recent ? kNewest", "position >= end - rules.recent - 1 ? kNewest"
    ),
    "rules: recent one too few": Fault(
        "rules.cuh", "position >= end - rules.recent ? kNewest", "position > end - rules.recent ? kNewest"
    ),
    "rules: a sink too few": Fault("rules.cuh", "position < rules.heavy", "position < rules.heavy - 1"),
    "prefill: maximum not rescaled": Fault("attend.cuh", "mass[r] *= shrink;", ";"),
    "prefill: maximum of one lane": Fault(
        "attend.cuh", "top[r] = fmaxf(top[r], __shfl_xor_sync(~0u, top[r], 2));", ";"
    ),
    "prefill: low-rank term without its maximum": Fault(
        "attend.cuh", "all = fmaxf(all, logPhi[f] + __logf(z[f]));", ";"
    ),
    "prefill: scores of one head of the group": Fault(
        "select.cuh", "for (int g = 1; g < G; ++g) scores", "for (int g = 1; g < 0; ++g) scores"
    ),
    "prefill: a tile too many hidden by the window": Fault(
        "attend.cuh", "max(0, first - rules.window + 1) / N", "max(0, first - rules.window + N) / N"
    ),
    "prefill: slots hidden a row early": Fault(
        "attend.cuh", "first >= rules.window;", "first + kTileRows > rules.window;"
    ),
    "prefill: tova counts all queries": Fault(
        "score.cuh", "== Policy::kTova ? count - 1 : 0", "== Policy::kTova ? 0 : 0"
    ),
    "prefill: padding is a key": Fault(
        "attend.cuh", "*position = index < count ? past + index : -1;", "*position = past + index;"
    ),
    "prefill: values of empty slots not dropped": Fault("attend.cuh", "if (empty >> (x / kVectors) & 1)", "if (false)"),
    "prefill: slots beyond the last are seen": Fault("attend.cuh", "shared.positions[stage][own] = -1;", ";"),
    "prefill: ties keep the higher index": Fault(
        "select.cuh", "ties + equal.before < threshold.ties", "ties + equal.before >= threshold.ties"
    ),
    "prefill: ties not carried to the next tile": Fault("select.cuh", "ties += equal.total;", ";"),
    "prefill: all ties stay": Fault("select.cuh", "rank > threshold.rank ||", "rank >= threshold.rank ||"),
    "prefill: a dropped byte of the rank": Fault("select.cuh", "shift >= 0; shift -= 8", "shift >= 8; shift -= 8"),
    "prefill: swapped slots": Fault("select.cuh", "freed[turn] : kRests", "freed[turn ^ 1] : kRests"),
    "prefill: nothing absorbed": Fault("settle.cuh", "row[d] += total(d);", ";"),
    "prefill: z not updated": Fault("settle.cuh", "p.t.presentZ[feature] += totalMass();", ";"),
    "prefill: old scores forgotten": Fault("select.cuh", "scores[n] += slotScores[n] * left;", ";"),
    "prefill: old scores do not fade": Fault("select.cuh", "slotScores[n] * left;", "slotScores[n];"),
    "prefill: old scores fade once a step": Fault("select.cuh", "fadedBy(p.rules, count)", "fadedBy(p.rules, 1)"),
    "prefill: scores of the chunk do not fade": Fault("score.cuh", "fadedBy(rules, count - 1 - query)", "1.f"),
    "prefill: scores of the chunk fade a token too long": Fault("score.cuh", "count - 1 - query", "count - query"),
    "decode: scores do not fade": Fault(
        "decode_settle.cuh", "slotScores[first + u * kThreads] * rules.decay", "slotScores[first + u * kThreads]"
    ),
    "prefill: psi stays behind": Fault("settle.cuh", "target[to * R + r] = source[from * R + r];", ";"),
}

#: Faults in the decode kernel of float32 models.
FLOAT32_FAULTS = {
    "maximum not rescaled": Fault("decode_attend.cuh", "mass[g] *= shrink;", ";"),
    "accumulator not rescaled": Fault("decode_attend.cuh", "sums[g][i] *= shrink;", ";"),
    "a warp left out of the merge": Fault(
        "decode_attend.cuh",
        "for (int w = 0; w < kWarps; ++w) top = fmaxf(top",
        "for (int w = 1; w < kWarps; ++w) top = fmaxf(top",
    ),
    "unseen values not dropped": Fault("decode_attend.cuh", "if (!seen) zero(flight.value[u]);", ";"),
    "a block skips its second split": Fault("decode.cuh", "++split) attention", "split += 2) attention"),
    "keys without their scale": Fault("slots.cuh", "fmaf(key[i] * piece.scale,", "fmaf(key[i],"),
    "keys without std": Fault("slots.cuh", "piece.scale, stds[i], means[i])", "piece.scale, 1.f, means[i])"),
    "keys without mean": Fault("slots.cuh", "piece.scale, stds[i], means[i])", "piece.scale, stds[i], 0.f)"),
    "values without their scale": Fault("slots.cuh", "kCoded<S> ? weight * scale : weight", "weight"),
    "scales of empty slots are read": Fault("slots.cuh", "piece.scale = 0.f;", ";"),
    "slots not turned": Fault("decode_attend.cuh", "if constexpr (Turns) {", "if constexpr (false) {"),
    "partners of the own lane": Fault("decode_attend.cuh", "row * LPR + partners / 8", "row * LPR + column / 8"),
    "partners of another slot": Fault("decode_attend.cuh", "row * LPR + partners / 8", "partners / 8"),
    "partners with others' mean": Fault("decode_attend.cuh", "partners, others);", "column, others);"),
}

#: Faults in how the blocks of a head wait for one another, and in what depends on how many there are.
MERGE_FAULTS = {
    "no release": Fault("decode_block.cuh", "__threadfence();  // release", ";"),
    "no acquire": Fault("decode_block.cuh", "__threadfence();  // acquire", ";"),
    "released after the addition": Fault(
        "decode_block.cuh",
        "__threadfence();  // release\n        last = atomicAdd(counter, 1u) == blocks - 1;",
        "last = atomicAdd(counter, 1u) == blocks - 1;\n        __threadfence();",
    ),
    "counter not reset": Fault("decode_block.cuh", "if (last) atomicExch(counter, 0u);", ";"),
    "the last but one merges": Fault("decode_block.cuh", "== blocks - 1;", "== blocks - 2;"),
    "the first merges": Fault("decode_block.cuh", "== blocks - 1;", "== 0;"),
    "a split's weight forgotten": Fault(
        "decode_settle.cuh", "float const factor = factors[s];", "float const factor = 1.f;"
    ),
    "size of splits by the batch": Fault(
        "less_attention_decode.cu", "std::max(kSlotsPerSplit, ", "std::max(kSlotsPerSplit / (s.batch > 1 ? 2 : 1), "
    ),
    "a block's splits in the first one's place": Fault("decode_tiles.cuh", "tile < tiles; ++split)", "tile < tiles;)"),
    "the last split left out": Fault("decode_settle.cuh", "s < block.p.splits; ++s", "s < block.p.splits - 1; ++s"),
    "splits with one another's factors": Fault(
        "decode_settle.cuh", "float const factor = factors[s];", "float const factor = factors[block.p.splits - 1 - s];"
    ),
}

#: Faults in the rules of int8 slots.
INT8_FAULTS = {
    "keys without their scale": Fault("slots.cuh", "fmaf(key[i] * piece.scale,", "fmaf(key[i],"),
    "keys without std": Fault("slots.cuh", "piece.scale, stds[i], means[i])", "piece.scale, 1.f, means[i])"),
    "keys without mean": Fault("slots.cuh", "piece.scale, stds[i], means[i])", "piece.scale, stds[i], 0.f)"),
    "keys that are scored without mean": Fault("slots.cuh", "fmaf(stored, std[d], mean[d])", "stored * std[d]"),
    "keys that are scored without std": Fault("slots.cuh", "fmaf(stored, std[d], mean[d])", "stored + mean[d]"),
    "keys of one part": Fault("attend.cuh", "int part = 1; converted &&", "int part = 1; !converted &&"),
    "keys that are scored of one part": Fault("score.cuh", "if (converted) shared.keys", "if (!coded(p)) shared.keys"),
    "decode: keys without their scale": Fault("decode_logits.cuh", "scratch.units[h] * scales[e]", "scratch.units[h]"),
    "decode: keys without std": Fault(
        "decode_logits.cuh", "*= centring.std[column + e] * scratch.factors[h]", "*= scratch.factors[h]"
    ),
    "decode: keys without mean": Fault("decode_logits.cuh", "shift += element * centring.mean[d];", ";"),
    "decode: queries in one part": Fault(
        "decode_logits.cuh", "kCoded<S> ? s[octet][e] + s[octet][2 + e]", "kCoded<S> ? s[octet][e]"
    ),
    "decode: values without their scale": Fault("decode_tiles.cuh", "weight[i] *= scale[i];", ";"),
    "decode: sums not rescaled to the largest scale": Fault(
        "decode_tiles.cuh", "top) * kLog2E) * rescale;", "top) * kLog2E);"
    ),
    "decode: adjacent codes of values swapped": Fault(
        "decode_tiles.cuh", "4 * t + 2 * e : 2 * t", "4 * t + 2 * (1 - e) : 2 * t"
    ),
    "prefill: values without their scale": Fault("slots.cuh", "element[i] *= piece.scale;", ";"),
    "decode: scales of empty slots are read": Fault("decode_logits.cuh", "seen[0] ? scales.x : 0.f", "scales.x"),
    "prefill: empty slots are read": Fault("slots.cuh", "&& positions[slot] >= 0", "&& positions[slot] >= -1"),
    "a leaver's scale forgotten": Fault("slots.cuh", "kCoded<S> ? element * scales[slot] : element", "element"),
    "prefill: a leaver's scale forgotten": Fault("settle.cuh", "out[i] *= value.scale;", ";"),
    "tokens of the chunk absorbed as they are": Fault("settle.cuh", "out[i] = codeOf(out[i], scale) * scale;", ";"),
    "scales of the chunk not measured": Fault("settle.cuh", "p.rounding[h.head * chunk + i] = scale;", ";"),
    "scale of a new token not stored": Fault("slots.cuh", "if (kCoded<S> && lane == 0) scales[slot] = scale;", ";"),
    "scale of one lane": Fault("slots.cuh", "scaleOf(warpMax(largest))", "scaleOf(largest)"),
    "scale of 128 codes": Fault("slots.cuh", "__fdiv_rn(largest, kLargestCode)", "__fdiv_rn(largest, 128.f)"),
    "keys stored without mean": Fault("slots.cuh", "__fsub_rn(key, mean[d])", "key"),
    "keys stored without std": Fault(
        "slots.cuh", "__fdiv_rn(__fsub_rn(key, mean[d]), std[d])", "__fsub_rn(key, mean[d])"
    ),
    "codes truncated": Fault("slots.cuh", "rintf(", "truncf("),
    "halves away from zero": Fault("slots.cuh", "rintf(", "roundf("),
    "zeros divided by zero": Fault("slots.cuh", "if (scale == 0.f) return 0.f;", ";"),
    "rounded twice": Fault("slots.cuh", "codeOf(token(d), scale)", "codeOf(toFloat(__float2half_rn(token(d))), scale)"),
    "decode: the new key attended rounded": Fault(
        "decode_merge.cuh", "q[g * D + d] * newKey[d];", "q[g * D + d] * rintf(newKey[d] * 50.f) / 50.f;"
    ),
    "decode: the new value attended rounded": Fault(
        "decode_settle.cuh", "+ newValue[d] *", "+ rintf(newValue[d] * 50.f) / 50.f *"
    ),
    "prefill: values of the chunk attended rounded": Fault(
        "attend.cuh",
        "        accumulate<T, W, N>(o, s,",
        """        for (int x = tid; !converted && x < N * Tiles::kStride; x += kThreads)
            shared.values[stage].x[x] = fromFloat<T>(rintf(toFloat(shared.values[stage].x[x]) * 50.f) / 50.f);
        __syncthreads();
        accumulate<T, W, N>(o, s,""",
    ),
}

#: Faults in the rules of a state of 16 bits.
STATE16_FAULTS = {
    "no dither": Fault("state.cuh", "ditherOf(past, r, d)", "0.f"),
    "the nearest code": Fault("state.cuh", "ditherOf(past, r, d)", "0.5f"),
    "dither without the position": Fault("state.cuh", "past % kPeriod * kStep +", ""),
    "dither without the feature": Fault("state.cuh", "+ feature * kFeatureStep", ""),
    "dither without the channel": Fault("state.cuh", "+ channel * kChannelStep", ""),
    "prefill: dither of the position after the chunk": Fault("settle.cuh", "mine, h.past);", "mine, h.past + count);"),
    "decode: dither of the next position": Fault("decode_settle.cuh", "block.now);", "next);"),
    "decode: scale forgotten": Fault("decode_merge.cuh", "part * means.scales[r]", "part"),
    "prefill: scale forgotten": Fault("attend.cuh", "part * means.scales[f]", "part"),
    "decode: means divided by their mass": Fault(
        "decode_merge.cuh", "part * means.scales[r]", "part / mass * means.scales[r]"
    ),
    "scale of the mean before forgotten": Fault("state.cuh", "before > 0.f ? scales[r] : 0.f", "1.f"),
    "scales of features without mass are read": Fault("state.cuh", "before > 0.f ? scales[r] : 0.f", "scales[r]"),
    "new scale not stored": Fault("state.cuh", "scales[r] = scale;", ";"),
    "new mass not stored": Fault("state.cuh", "z[r] = after;", ";"),
    "the mean before not moved": Fault("state.cuh", "__fsub_rn(totals(i), __fmul_rn(mass, old))", "totals(i)"),
    "moved by the mass before": Fault("state.cuh", "__fmul_rn(mass, old)), after)", "__fmul_rn(mass, old)), before)"),
    "scale of one lane": Fault("state.cuh", "warpMax(largest), kLargestMean", "largest, kLargestMean"),
    "scale of 32767 codes": Fault("state.cuh", "kLargestMean = 127 * 256 + 127", "kLargestMean = 32767"),
    "rounded without mass": Fault("state.cuh", "if (!(mass > 0.f)) return;", ";"),
    "decode: planes swapped": Fault("state.cuh", "256 * high[0] + high[D]", "256 * high[D] + high[0]"),
    "prefill: planes swapped": Fault("state.cuh", "256 * high.x + low.x", "256 * low.x + high.x"),
    "stored planes swapped": Fault("state.cuh", "high[d] = static_cast<int8_t>(upper);", "high[d] = 0;"),
    "low plane without a sign": Fault("state.cuh", "(rounded + 128) >> 8", "rounded >> 8"),
    "psi not divided by its sum": Fault(
        "state.cuh", "__fdiv_rn(toFloat(code), fmaxf(sum, 1.f))", "toFloat(code) / 127.f"
    ),
    "prefill: psi of the chunk absorbed as it is": Fault(
        "settle.cuh", "inMeans ? shareOf(codes[r], sum)", "inMeans && n < C ? shareOf(codes[r], sum)"
    ),
    "prefill: psi of slots not summed": Fault(
        "settle.cuh", "if (lane == 0) p.psiSums", "if (lane == 0 && from.chunk) p.psiSums"
    ),
    "prefill: psi stays behind": Fault("settle.cuh", "move(static_cast<int8_t*>(p.t.presentPsi), p.psis);", ";"),
    "decode: psi stays behind": Fault("decode_settle.cuh", "if (warp == 2) storePsi(", "if (warp == 5) storePsi("),
    "decode: the first of several absorbed": Fault(
        "decode_settle.cuh", "several ? C : moves.leaver + 1", "moves.leaver + 1"
    ),
    "decode: nothing absorbed": Fault("decode_settle.cuh", "if (any && inMeans) {", "if (false) {"),
}

#: Faults in what short chunks have of their own.
SHORT_FAULTS = {
    "tova counts all queries": Fault(SHORT, "== Policy::kTova ? count - 1 : 0", "== Policy::kTova ? 0 : 0"),
    "the last query does not count": Fault(SHORT, "query < count; ++query", "query < count - 1; ++query"),
    "logits of the chunk in the slots' place": Fault(SHORT, "tilesOf(s.slots) * kTileRows + index", "index"),
    "logits of half the queries": Fault(SHORT, "for (int r = 0; r < 2; ++r)", "for (int r = 0; r < 1; ++r)"),
    "logits of padding": Fault(SHORT, " || query >= count) continue;", ") continue;"),
    "scores do not fade": Fault(SHORT, "fadedBy(p.rules, count - 1 - query)", "1.f"),
    "scores fade a token too long": Fault(SHORT, "count - 1 - query", "count - query"),
    "queries not turned": Fault(SHORT, "turnQueries<T>(p, 0);", ";"),
    "values not measured": Fault(SHORT, "measureTile<T>(p, h, 0);", ";"),
    "psi of the chunk not rounded": Fault(SHORT, "tile <= tilesOf(p.shape.slots)", "tile < tilesOf(p.shape.slots)"),
    "psi of slots not summed": Fault(
        SHORT, "int tile = 0; tile <= tilesOf", "int tile = tilesOf(p.shape.slots); tile <= tilesOf"
    ),
    "only the first features absorb": Fault(SHORT, "first < p.shape.rank;", "first < 1;"),
    "new tokens not stored": Fault(SHORT, "placeTile<T, S>(p, h, 0);", ";"),
}

#: Faults in what distances add.
DISTANCE_FAULTS = {
    "age one too many": Fault("rotary.cuh", "static_cast<unsigned>(past) -", "static_cast<unsigned>(past + 1) -"),
    "table read by position": Fault("rotary.cuh", "rowOf(min(age,", "rowOf(min(static_cast<unsigned>(position),"),
    "clamp forgotten": Fault("rotary.cuh", "static_cast<unsigned>(farthest)", "127u"),
    "clamp one too near": Fault("rotary.cuh", "static_cast<unsigned>(farthest)", "static_cast<unsigned>(farthest - 1)"),
    "clamp one too far": Fault("rotary.cuh", "static_cast<unsigned>(farthest)", "static_cast<unsigned>(farthest + 1)"),
    "slots turned ahead": Fault("rotary.cuh", ", -1.f};", ", 1.f};"),
    "tokens turned back": Fault("rotary.cuh", ", 1.f};", ", -1.f};"),
    "eight columns turned with one sign": Fault(
        "rotary.cuh", "float const sign = column < half ? -turn.sign : turn.sign;", "float const sign = turn.sign;"
    ),
    "one column turned with one sign": Fault(
        "rotary.cuh", "float const sign = d < half ? -turn.sign : turn.sign;", "float const sign = turn.sign;"
    ),
    "the rest rotated too": Fault("rotary.cuh", "return d < 2 * half;", "return true;"),
    "decode: slots not turned": Fault("decode_logits.cuh", "multiplyTurned(stage, s);", "multiplyStored(stage, s);"),
    "decode: partners of another slot": Fault(
        "decode_logits.cuh", "keys.piece(row, other), other", "keys.piece(row ^ 1, other), other"
    ),
    "decode: partners with others' mean": Fault(
        "decode_logits.cuh", "other), other, partners);", "other), column, partners);"
    ),
    "decode: keys in one part": Fault("decode_logits.cuh", "part < kParts<Key>; ++part", "part < 1; ++part"),
    "decode: scale of reduced keys": Fault(
        "decode_logits.cuh", "kReduction<std::conditional_t<Turns, Key, float>>", "1.f"
    ),
    "prefill: queries not turned": Fault("turn.cuh", "rotary.ahead(query)", "rotary.ahead(0)"),
    "prefill: tokens not turned": Fault("turn.cuh", "rotary.ahead(row)", "rotary.ahead(0)"),
    "prefill: slots not turned": Fault("turn.cuh", "rotary.back(positions[row], past)", "rotary.back(past, past)"),
    "prefill: scale of reduced keys": Fault("less_attention_prefill.cu", "params.rules.scale /=", "float const lost ="),
    "elements of float16 overflow": Fault("rotary.cuh", "std::is_same_v<T, __half> ? 0.5f : 1.f", "1.f"),
    "prefill: keys of one part": Fault("attend.cuh", "int part = 1; converted &&", "int part = 1; !converted &&"),
    "prefill: queries of one part": Fault("attend.cuh", "int part = 1; turning &&", "int part = 1; !turning &&"),
    "scores: keys of one part": Fault("score.cuh", "if (converted) shared.keys", "if (!converted) shared.keys"),
    "scores: queries of one part": Fault("score.cuh", "int part = 1; turning &&", "int part = 1; !turning &&"),
    "scores: slots turned like tokens": Fault(
        "score.cuh", "Turn const turn = from.chunk ?", "Turn const turn = true ?"
    ),
    "scores: tokens turned like slots": Fault(
        "score.cuh", "Turn const turn = from.chunk ?", "Turn const turn = false ?"
    ),
    "decode: a turned key takes the slot": Fault(
        "decode_settle.cuh",
        "centring.centred(newKey[d], d);",
        "centring.centred(newKey[d] * p.t.rotary[p.shape.rotary], d);",
    ),
    "prefill: a turned key takes the slot": Fault(
        "settle.cuh",
        "centring.centred(toFloat(key[d]), d);",
        """[&] {
            Rotary const rotary = Rotary::of(p.shape, p.rules, p.t);
            return centring.centred(rotary.turned(rotary.ahead(i), d, [&](int x) { return toFloat(key[x]); }), d);
        }();""",
    ),
}
