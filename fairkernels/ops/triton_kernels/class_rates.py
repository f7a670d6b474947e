"""What each class's samples add up to: rates, the surrogate's row, losses. A program owns a class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..schema import accumulation_dtype
from .class_blocks import (
    add_exactly,
    charge_of,
    exps_of,
    extended,
    finite_top,
    first_place,
    gates_of,
    hits_of,
    load_block,
    load_class_weights,
    load_weights,
    log_sum,
    rivals_of,
    strongest,
)
from .class_order import ClassOrder, class_of
from .class_terms import Inputs, Results, Terms
from .common import divided, number, offset_of
from .launch import cdiv, last_stride, launch, power_of_2, problems, real_type

LONGEST_ROW = {torch.float32: 4096, torch.float64: 2048}
"""Classes whose logits one program holds in registers, by accumulation dtype; longer rows are read in pieces."""


MANY_PROGRAMS = 1024
SAMPLES_OF_A_PART = 32


@dataclass(frozen=True)
class Tile:
    """How many rows and columns a program holds, and by how many warps."""

    rows: int
    columns: int
    warps: int
    wide: bool  # whether a row takes more than one

    @property
    def options(self) -> dict[str, Any]:
        return {"num_warps": self.warps}


def tile_of(num_classes: int, real: torch.dtype, charges: bool = False) -> Tile:
    """Where there are charges to be added up beside the rates, half as many columns fit."""
    longest = LONGEST_ROW[real] // 2 if charges else LONGEST_ROW[real]
    wide = num_classes > longest
    columns = longest // 4 if wide else power_of_2(num_classes)
    least, most_warps = (1024, 16) if real == torch.float32 else (512, 8)
    rows = 1 if wide else max(1, least // columns)
    return Tile(rows, columns, min(max(4, 4 * rows * columns // least), most_warps), wide)


@triton.jit
def spread_of(z, lse, class_weight, columns, K, REAL: tl.constexpr):
    """What smoothing adds to the loss of a row: the weighted losses it would have at each class."""
    return tl.sum(tl.where((columns < K)[None, :], class_weight[None, :] * (lse[:, None] - z), 0.0), 1)


@triton.jit
def load_class_weight(weight, label, stride, REAL: tl.constexpr):
    own = tl.full((), 1.0, REAL)
    if weight is not None:
        own = tl.load(weight + tl.cast(label, tl.int64) * stride).to(REAL)
    return own


@triton.jit
def sum_of_rows(tile):
    return tl.sum(tile, 0)[None, :]


@triton.jit(do_not_specialize=["B", "row_stride", "sizes", "strides", "label_sizes", "label_strides", "weight_sizes",
                               "weight_strides", "ignore_index", "size"])  # fmt: skip
def row_statistics(
    logits, labels, weight, statistics, B, K, size,
    row_stride, column_stride, label_stride, weight_stride,
    sizes, strides, label_sizes, label_strides, weight_sizes, weight_strides,
    ignore_index, temperature: tl.float64, label_smoothing: tl.float64, margin: tl.float64,
    ENTROPY: tl.constexpr, SMOOTHING: tl.constexpr, RIVAL: tl.constexpr, HEATED: tl.constexpr,
    REAL: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Bound by one read of the logits; a row that smoothing reads again is then in the cache.
    problem = (tl.program_id(0) // B).to(tl.int64)
    row = (tl.program_id(0) % B).to(tl.int64) + tl.zeros((1,), tl.int64)
    logits += offset_of(problem, sizes, strides)
    labels += offset_of(problem, label_sizes, label_strides)
    if weight is not None:
        weight += offset_of(problem, weight_sizes, weight_strides)
    given = tl.load(labels + row * label_stride)
    kept = given != ignore_index
    label = tl.where((given >= 0) & (given < K), given, 0)

    top, total = tl.full((1,), float("-inf"), REAL), tl.zeros((1,), REAL)
    highest, others = tl.full((1,), float("-inf"), REAL), tl.zeros((1,), REAL)
    place = tl.full((1,), 1 << 30, tl.int32)
    for first in range(0, K, BLOCK_K):
        columns = first + tl.arange(0, BLOCK_K)
        z = load_block(
            logits, row, kept, columns, K, row_stride, column_stride, number(temperature, REAL), HEATED, REAL
        )
        top, total = extended(top, total, z)
        if RIVAL:
            rivals = rivals_of(z, columns[None, :] == label[:, None])
            place = tl.where(strongest(rivals) > highest, first_place(rivals, strongest(rivals), columns), place)
            highest, others = extended(highest, others, tl.where(rivals == rivals, rivals, float("inf")))

    at = statistics + problem * B + row
    tl.store(at, top, mask=kept)
    tl.store(at + size, total, mask=kept)
    own_logit = tl.load(logits + row * row_stride + label * column_stride, mask=kept, other=0).to(REAL)
    if HEATED:
        own_logit = own_logit / number(temperature, REAL)
    if ENTROPY:
        lse = log_sum(top, total)
        loss = load_class_weight(weight, tl.sum(label, 0), weight_stride, REAL) * (lse - own_logit)
        if SMOOTHING:
            smoothing = number(label_smoothing, REAL)
            spread = tl.zeros((1,), REAL)
            for first in range(0, K, BLOCK_K):
                columns = first + tl.arange(0, BLOCK_K)
                z = load_block(logits, row, kept, columns, K, row_stride, column_stride, 1.0, False, REAL)
                spread += spread_of(
                    z, lse, load_class_weights(weight, columns, K, weight_stride, REAL), columns, K, REAL
                )
            loss = (1 - smoothing) * loss + smoothing / K * spread
        tl.store(at + 2 * size, loss, mask=kept)
    if RIVAL:
        place, charge, _ = charge_of(own_logit, highest, others, place, number(margin, REAL))
        tl.store(at + 3 * size, charge, mask=kept)
        tl.store(at + 4 * size, place.to(REAL), mask=kept)


@triton.jit
def class_of_slot(labels, order, starts, slot, B, K, label_stride, ignore_index, DIRECT: tl.constexpr):
    """The class that has this slot, K if none has."""
    label = slot
    if not DIRECT:
        used = slot < tl.load(starts + K)
        sample = tl.load(order + slot, mask=used, other=0).to(tl.int64)
        given = tl.load(labels + sample * label_stride, mask=used, other=ignore_index)
        label = class_of(given, K, ignore_index).to(tl.int32)
        first = tl.load(starts + label) == slot
        label = tl.where(used & first, label, K)
    return label


@triton.jit(do_not_specialize=["B", "slots", "row_stride", "sizes", "strides", "label_sizes", "label_strides",
                               "sample_sizes", "sample_strides", "weight_sizes", "weight_strides", "class_weight_sizes",
                               "class_weight_strides", "ignore_index", "parts", "size"])  # fmt: skip
def rates_by_class(
    logits, labels, sample_weight, weight, class_weight, order, starts, statistics, all_weights,
    rates, charges, confusion, counts, counts_by_class, losses, divisors, part_mass, part_charge, part_numbers,
    B, K, slots, parts, size, row_stride, column_stride, label_stride, sample_stride, weight_stride,
    class_weight_stride,
    sizes, strides, label_sizes, label_strides, sample_sizes, sample_strides, weight_sizes, weight_strides,
    class_weight_sizes, class_weight_strides, ignore_index,
    temperature: tl.float64, label_smoothing: tl.float64, margin: tl.float64,
    NORMALIZE: tl.constexpr, ENTROPY: tl.constexpr, SMOOTHING: tl.constexpr, SURROGATE: tl.constexpr,
    ZERO_MARGIN: tl.constexpr, HEATED: tl.constexpr, DIRECT: tl.constexpr, WIDE: tl.constexpr, SPLIT: tl.constexpr,
    REAL: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Bound by one read of the logits and the rows it writes; an exponential an element, for a surrogate another.
    pieces = tl.cdiv(K, BLOCK_K)
    piece = tl.program_id(0) % pieces
    part = tl.program_id(0) // pieces % parts
    slot = tl.program_id(0) // pieces // parts % slots
    problem = (tl.program_id(0) // pieces // parts // slots).to(tl.int64)
    columns = piece * BLOCK_K + tl.arange(0, BLOCK_K)

    logits += offset_of(problem, sizes, strides)
    labels += offset_of(problem, label_sizes, label_strides)
    order += problem * B
    starts += problem * (K + 1)
    if sample_weight is not None:
        sample_weight += offset_of(problem, sample_sizes, sample_strides)
    if weight is not None:
        weight += offset_of(problem, weight_sizes, weight_strides)

    label = class_of_slot(labels, order, starts, slot, B, K, label_stride, ignore_index, DIRECT)
    occurs = label < K
    begin = tl.load(starts + label, mask=occurs, other=0)
    end = tl.load(starts + label + 1, mask=occurs, other=0)
    if SPLIT:
        share = tl.cdiv(end - begin, parts)
        begin += tl.minimum(part * share, end - begin)
        end = tl.minimum(begin + share, end)
    label = tl.where(occurs, label, 0)
    own = (columns == label)[None, :]
    by_class = load_class_weights(weight, columns, K, weight_stride, REAL)

    mass, mass_lost = tl.zeros((1, BLOCK_K), REAL), tl.zeros((1, BLOCK_K), REAL)  # as a row of the tile lies
    charge, charge_lost = tl.zeros((1, BLOCK_K), REAL), tl.zeros((1, BLOCK_K), REAL)
    weights = tl.zeros((ROWS,), tl.float64)
    loss = tl.zeros((ROWS,), tl.float64)
    for first in range(begin, end, ROWS):
        at = first + tl.arange(0, ROWS)
        inside = at < end
        row = tl.load(order + at, mask=inside, other=0).to(tl.int64)
        row_weight = load_weights(labels, sample_weight, row, inside, label_stride, sample_stride, K, REAL)
        weights += row_weight.to(tl.float64)
        z = load_block(
            logits, row, inside, columns, K, row_stride, column_stride, number(temperature, REAL), HEATED, REAL
        )
        own_logit = tl.load(logits + row * row_stride + label.to(tl.int64) * column_stride, mask=inside, other=0).to(
            REAL
        )
        if HEATED:
            own_logit = own_logit / number(temperature, REAL)

        if WIDE:
            known = statistics + problem * B + row
            top = tl.load(known, mask=inside, other=0)
            total = tl.load(known + size, mask=inside, other=1)
            exps = exps_of(z, top)
        else:
            top = tl.max(z, 1)
            exps = exps_of(z, top)
            total = tl.sum(exps, 1)
        if rates is not None or confusion is not None:
            mass, mass_lost = add_exactly(mass, mass_lost, sum_of_rows(exps * (row_weight / total)[:, None]))

        lse = log_sum(top, total)
        if ENTROPY:
            if WIDE:
                row_loss = tl.load(known + 2 * size, mask=inside, other=0)
            else:
                row_loss = load_class_weight(weight, label, weight_stride, REAL) * (lse - own_logit)
                if SMOOTHING:
                    smoothing = number(label_smoothing, REAL)
                    spread = spread_of(z, lse, by_class, columns, K, REAL)
                    row_loss = (1 - smoothing) * row_loss + smoothing / K * spread
            loss += (row_loss * row_weight).to(tl.float64)
        if charges is not None:
            if SURROGATE == "gated":
                row_charge = gates_of(z, own_logit, number(margin, REAL)) * exps * (1 / total)[:, None]
            elif SURROGATE == "kl-all":
                inverse = 1 / total  # as the gradient has it: at the margin both hit or neither, but for the last place
                own_rate = tl.exp(own_logit - finite_top(top)) * inverse
                by_rates = exps * inverse[:, None]
                hits = hits_of(z, by_rates, own_logit, own_rate, own, columns, K, number(margin, REAL), ZERO_MARGIN)
                row_charge = tl.where(hits, (lse - own_logit)[:, None], 0.0)
            else:
                if WIDE:
                    row_loss = tl.load(known + 3 * size, mask=inside, other=0)
                    place = tl.load(known + 4 * size, mask=inside, other=-1).to(tl.int32)
                else:
                    rivals = rivals_of(z, own)
                    highest = strongest(rivals)
                    others = tl.sum(exps_of(rivals, highest), 1)
                    place = first_place(rivals, highest, columns)
                    place, row_loss, _ = charge_of(own_logit, highest, others, place, number(margin, REAL))
                row_charge = tl.where(columns[None, :] == place[:, None], row_loss[:, None], 0.0)
            row_charge = tl.where(inside[:, None] & (own == 0), row_charge, 0.0)
            row_charge = row_charge * tl.where(inside, row_weight, 1.0)[:, None]
            charge, charge_lost = add_exactly(charge, charge_lost, sum_of_rows(row_charge))

    mass, charge = tl.sum(mass, 0), tl.sum(charge, 0)
    loss = tl.sum(loss, 0)
    samples = tl.sum(weights, 0)
    if SPLIT:
        place = part * (tl.num_programs(0) // pieces // parts).to(tl.int64) + problem * slots + slot
        is_class = columns < K
        if rates is not None or confusion is not None:
            tl.store(part_mass + place * K + columns, mass, mask=is_class)
        if charges is not None:
            tl.store(part_charge + place * K + columns, charge, mask=is_class)
        if piece == 0:
            tl.store(part_numbers + 2 * place, samples)
            tl.store(part_numbers + 2 * place + 1, loss)
    else:
        store_class(
            rates, charges, confusion, counts, counts_by_class, losses, divisors, all_weights, weight, class_weight,
            starts,
            mass, charge, samples, loss, problem, slot, slots, label, occurs, columns, piece, K, weight_stride,
            class_weight_stride, class_weight_sizes, class_weight_strides,
            NORMALIZE, ENTROPY, SURROGATE, DIRECT, REAL,
        )  # fmt: skip


@triton.jit
def store_class(
    rates, charges, confusion, counts, counts_by_class, losses, divisors, all_weights, weight, class_weight, starts,
    mass, charge, samples, loss, problem, slot, slots, label, occurs, columns, piece, K, weight_stride,
    class_weight_stride, class_weight_sizes, class_weight_strides,
    NORMALIZE: tl.constexpr, ENTROPY: tl.constexpr, SURROGATE: tl.constexpr, DIRECT: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """What the sums over a class's samples are wanted for; a class without samples gets zeros."""
    samples = samples.to(REAL)
    is_class = columns < K
    place = problem * slots + slot
    if piece == 0:
        if counts is not None:
            tl.store(counts + place, samples)
        if counts_by_class is not None:
            tl.store(counts_by_class + place, samples)
        if ENTROPY:
            tl.store(losses + place, loss)
            own_weight = load_class_weight(weight, label, weight_stride, REAL)
            tl.store(divisors + place, tl.where(samples > 0, samples * own_weight, 0.0).to(tl.float64))

    rate = divided(mass, samples)
    if confusion is not None:
        if NORMALIZE == "none":
            handed = mass
        elif NORMALIZE == "all":
            handed = divided(mass, tl.load(all_weights + problem))
        else:
            handed = rate
        tl.store(confusion + (problem * K + label) * K + columns, handed, mask=is_class & (occurs | DIRECT))
    factor = tl.full((), 1.0, REAL)
    if class_weight is not None:
        class_weight += offset_of(problem, class_weight_sizes, class_weight_strides)
        factor = tl.where(samples > 0, load_class_weight(class_weight, label, class_weight_stride, REAL), 1.0)
    if rates is not None:
        rate = tl.where(columns == label, 0 * rate, rate)
        tl.store(rates + place * K + columns, factor * rate, mask=is_class)
    if charges is not None:
        charged_by = samples
        if SURROGATE == "kl-all":
            charged_by = tl.load(starts + K).to(REAL)
        tl.store(charges + place * K + columns, factor * divided(charge, charged_by), mask=is_class)


@triton.jit(do_not_specialize=["B", "slots", "parts", "label_sizes", "label_strides", "weight_sizes", "weight_strides",
                               "class_weight_sizes", "class_weight_strides", "ignore_index"])  # fmt: skip
def combine_parts(
    labels, weight, class_weight, order, starts, all_weights,
    rates, charges, confusion, counts, counts_by_class, losses, divisors, part_mass, part_charge, part_numbers,
    B, K, slots, parts, label_stride, weight_stride, class_weight_stride,
    label_sizes, label_strides, weight_sizes, weight_strides, class_weight_sizes, class_weight_strides, ignore_index,
    NORMALIZE: tl.constexpr, ENTROPY: tl.constexpr, SURROGATE: tl.constexpr, DIRECT: tl.constexpr, REAL: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Bound by one read of the parts and one write of what becomes of them.
    pieces = tl.cdiv(K, BLOCK_K)
    piece = tl.program_id(0) % pieces
    slot = tl.program_id(0) // pieces % slots
    problem = (tl.program_id(0) // pieces // slots).to(tl.int64)
    columns = piece * BLOCK_K + tl.arange(0, BLOCK_K)
    labels += offset_of(problem, label_sizes, label_strides)
    order += problem * B
    starts += problem * (K + 1)
    if weight is not None:
        weight += offset_of(problem, weight_sizes, weight_strides)
    label = class_of_slot(labels, order, starts, slot, B, K, label_stride, ignore_index, DIRECT)
    occurs = label < K
    label = tl.where(occurs, label, 0)

    mass, mass_lost = tl.zeros((BLOCK_K,), REAL), tl.zeros((BLOCK_K,), REAL)
    charge, charge_lost = tl.zeros((BLOCK_K,), REAL), tl.zeros((BLOCK_K,), REAL)
    samples, loss = tl.zeros((), tl.float64), tl.zeros((), tl.float64)
    for part in range(parts):
        place = part * (tl.num_programs(0) // pieces).to(tl.int64) + problem * slots + slot
        if rates is not None or confusion is not None:
            more = tl.load(part_mass + place * K + columns, mask=columns < K, other=0)
            mass, mass_lost = add_exactly(mass, mass_lost, more)
        if charges is not None:
            more = tl.load(part_charge + place * K + columns, mask=columns < K, other=0)
            charge, charge_lost = add_exactly(charge, charge_lost, more)
        samples += tl.load(part_numbers + 2 * place)
        loss += tl.load(part_numbers + 2 * place + 1)
    store_class(
        rates, charges, confusion, counts, counts_by_class, losses, divisors, all_weights, weight, class_weight, starts,
        mass, charge, samples, loss, problem, slot, slots, label, occurs, columns, piece, K, weight_stride,
        class_weight_stride, class_weight_sizes, class_weight_strides,
        NORMALIZE, ENTROPY, SURROGATE, DIRECT, REAL,
    )  # fmt: skip


@dataclass(frozen=True)
class Sums:
    """What the classes of each problem add up to, a row for each of R slots."""

    rates: Tensor | None  # [problems, R, K], zeros on the diagonal unless NaN
    charges: Tensor | None  # [problems, R, K], the surrogate's, unless it is "soft"
    counts: Tensor | None  # [problems, R]
    losses: Tensor | None  # [problems, R], float64
    divisors: Tensor | None  # [problems, R], float64


def slot_count(batch: int, num_classes: int) -> int:
    return min(batch, num_classes)


def is_direct(batch: int, num_classes: int) -> bool:
    """Whether the slot of a class is the class."""
    return batch >= num_classes


def part_count(batch: int, num_classes: int, tile: Tile) -> int:
    """Among how many programs the samples of a class are divided: more than one where classes are few and samples many,
    so that all of a GPU reads. Nobody looks at the labels: of a class that has most samples one program reads them all
    where classes are many."""
    programs = num_classes * cdiv(num_classes, tile.columns)
    return max(1, min(cdiv(MANY_PROGRAMS, programs), batch // num_classes // SAMPLES_OF_A_PART))


def sums_by_class(inputs: Inputs, terms: Terms, results: Results, by_class: ClassOrder) -> Sums:
    """One launch, one read of the logits; of rows longer than ``LONGEST_ROW`` two launches and two reads.

    Where classes are few and samples many (``part_count``) one launch more, over one partial sum of each part.
    """
    logits, labels = inputs.logits, inputs.labels
    *_, batch, num_classes = logits.shape
    leading = logits.shape[:-2].numel()
    real = accumulation_dtype(logits.dtype)
    soft = terms.spectral and terms.surrogate == "soft"
    tile = tile_of(num_classes, real, charges=terms.spectral and not soft)
    in_slots = terms.symmetry or terms.spectral or terms.entropy
    direct = is_direct(batch, num_classes) or not in_slots
    slots = num_classes if direct else batch

    def fresh(*shape: int, dtype: torch.dtype = real, wanted: bool = True) -> Tensor | None:
        return logits.new_empty((leading, *shape), dtype=dtype) if wanted else None

    sums = Sums(
        rates=fresh(slots, num_classes, wanted=terms.symmetry or soft),
        charges=fresh(slots, num_classes, wanted=terms.spectral and not soft),
        counts=fresh(slots, wanted=terms.symmetry),
        losses=fresh(slots, dtype=torch.float64, wanted=terms.entropy),
        divisors=fresh(slots, dtype=torch.float64, wanted=terms.entropy),
    )
    parts = part_count(batch, num_classes, tile)
    split = parts > 1
    part_mass = fresh(
        parts, slots, num_classes, wanted=split and (sums.rates is not None or results.confusion is not None)
    )
    part_charge = fresh(parts, slots, num_classes, wanted=split and sums.charges is not None)
    part_numbers = fresh(parts, slots, 2, dtype=torch.float64, wanted=split)
    everything = all_weights(inputs, terms)
    if results.confusion is not None and not direct:
        results.confusion.zero_()  # the rows of classes that have no slot
    statistics = statistics_of_rows(inputs, terms, tile) if tile.wide else None
    sizes, strides = problems(logits, 2)
    label_sizes, label_strides = problems(labels, 1)
    sample_sizes, sample_strides = problems(inputs.sample_weight, 1)
    weight_sizes, weight_strides = problems(inputs.weight, 1)
    class_weight_sizes, class_weight_strides = problems(inputs.class_weight, 1)
    launch(
        rates_by_class,
        (leading * slots * parts * cdiv(num_classes, tile.columns),),
        logits, labels, inputs.sample_weight, inputs.weight, inputs.class_weight, by_class.order, by_class.starts,
        statistics, everything,
        sums.rates, sums.charges, results.confusion, sums.counts, results.counts, sums.losses, sums.divisors,
        part_mass, part_charge, part_numbers,
        batch, num_classes, slots, parts, leading * batch, *logits.stride()[-2:], labels.stride(-1),
        last_stride(inputs.sample_weight),
        last_stride(inputs.weight), last_stride(inputs.class_weight),
        sizes, strides, label_sizes, label_strides, sample_sizes, sample_strides, weight_sizes, weight_strides,
        class_weight_sizes, class_weight_strides, terms.ignore_index,
        terms.temperature, terms.label_smoothing, terms.margin,
        **tile.options, NORMALIZE=terms.normalize, ENTROPY=terms.entropy, SMOOTHING=terms.label_smoothing != 0,
        SURROGATE=terms.surrogate, ZERO_MARGIN=terms.margin == 0, HEATED=terms.temperature != 1, DIRECT=direct,
        WIDE=tile.wide, SPLIT=split, REAL=real_type(logits.dtype), ROWS=tile.rows, BLOCK_K=tile.columns,
    )  # fmt: skip
    if split:
        launch(
            combine_parts,
            (leading * slots * cdiv(num_classes, tile.columns),),
            labels, inputs.weight, inputs.class_weight, by_class.order, by_class.starts, everything,
            sums.rates, sums.charges, results.confusion, sums.counts, results.counts, sums.losses, sums.divisors,
            part_mass, part_charge, part_numbers, batch, num_classes, slots, parts,
            labels.stride(-1), last_stride(inputs.weight), last_stride(inputs.class_weight), label_sizes, label_strides,
            weight_sizes, weight_strides, class_weight_sizes, class_weight_strides, terms.ignore_index,
            **tile.options, NORMALIZE=terms.normalize, ENTROPY=terms.entropy, SURROGATE=terms.surrogate,
            DIRECT=direct, REAL=real_type(logits.dtype), BLOCK_K=tile.columns,
        )  # fmt: skip
    return sums


def statistics_of_rows(inputs: Inputs, terms: Terms, tile: Tile) -> Tensor:
    """``[5, problems, B]``: each row's top, sum of exponentials, loss, charge of "kl" and its place."""
    logits, labels = inputs.logits, inputs.labels
    *_, batch, num_classes = logits.shape
    leading = logits.shape[:-2].numel()
    statistics = logits.new_empty((5, leading, batch), dtype=accumulation_dtype(logits.dtype))
    sizes, strides = problems(logits, 2)
    label_sizes, label_strides = problems(labels, 1)
    weight_sizes, weight_strides = problems(inputs.weight, 1)
    launch(
        row_statistics,
        (leading * batch,),
        logits, labels, inputs.weight, statistics, batch, num_classes, leading * batch,
        *logits.stride()[-2:], labels.stride(-1), last_stride(inputs.weight),
        sizes, strides, label_sizes, label_strides, weight_sizes, weight_strides,
        terms.ignore_index, terms.temperature, terms.label_smoothing, terms.margin,
        **tile.options, ENTROPY=terms.entropy, SMOOTHING=terms.label_smoothing != 0,
        RIVAL=terms.spectral and terms.surrogate == "kl", HEATED=terms.temperature != 1, REAL=real_type(logits.dtype),
        BLOCK_K=tile.columns,
    )  # fmt: skip
    return statistics


def all_weights(inputs: Inputs, terms: Terms) -> Tensor | None:
    """What ``normalize="all"`` divides by; a sum over samples, by PyTorch."""
    if not terms.confusion or terms.normalize != "all":
        return None
    counted = inputs.labels != terms.ignore_index
    if inputs.sample_weight is not None:
        counted = torch.where(counted, inputs.sample_weight, 0)
    return counted.sum(-1, dtype=accumulation_dtype(inputs.logits.dtype)).reshape(-1)
