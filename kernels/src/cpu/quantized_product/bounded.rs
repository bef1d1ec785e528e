//! Products of bytes where the only instruction for them (`vpmaddubsw`) saturates the sum of two: taken wherever bounds say that it can't.
//!
//! A word of A holds four terms of a row's sum, a word of B those of a column; the instruction makes two sums of two 16-bit products each, and what two words
//! made may be added in 16 bits before it is widened. That takes 5 instructions for 64 terms, or 3 for 32, where pairs of `i16` take 4 for 32. So each word is
//! multiplied in one of three ways, by a bound on the 16-bit sums: a limit of the weights in a panel, known when they are packed, against a measure of the
//! values in a block of rows. The values decide what is faster, never what comes out.
//!
//! The instruction takes one side unsigned. That is A as a rule: the limit then is 32767 over the largest sum of weights of one sign, the measure the largest
//! value. Of a quantization about zero A's bytes are signed, and small but for a few; B's are made unsigned by adding 128, which the sum of the row takes off
//! again. The limit then is 32767 over the largest weight, the measure the largest sum of values of one sign.

use crate::cpu::isa::Isa;
use std::sync::atomic::{Ordering, compiler_fence};

/// Rows of a register tile: with two vectors of columns, what is multiplied and what is added up, sixteen registers hold no more.
pub(super) const fn tile_rows<I: Isa>() -> usize {
    if I::REGISTERS >= 32 { 8 } else { 4 }
}

/// Most that a sum of 16 bits may be.
const MOST: u32 = i16::MAX as u32;

/// Every byte 1, and every half.
const ONES: i32 = 0x0101_0101;
const ONE_HALVES: i32 = 0x0001_0001;

/// Bytes of limits for a panel: one for every word, then one for every two that are multiplied together.
pub(super) const fn limits_len(words: usize) -> usize {
    words + words / 2
}

/// `f32`s of workspace that [`Measures`] and [`Steps`] take.
pub(super) const fn workspace_len(words: usize) -> usize {
    (limits_len(words) + SCRATCH * room(words)).div_ceil(4) + 4 * words
}

/// Arrays of a word each that measuring takes, in bytes for a word: a row's positive and negative parts, the largest sums of one word and of two.
const SCRATCH: usize = 4 * 4;

/// Words of such an array, so that vectors may read past its end.
const fn room(words: usize) -> usize {
    words + 16
}

/// The limits of a packed panel of `width` columns, in bytes `[word][column][4]`.
pub(super) fn limit(panel: &[u8], width: usize, words: usize, centred: bool, limits: &mut [u8]) {
    let half = words / 2;
    let (singles, doubles) = limits[..limits_len(words)].split_at_mut(words);
    let word = |word: usize| &panel[word * width * 4..][..width * 4];
    if centred {
        // A measure that a byte does not hold is 255.
        let limit = |largest: u8| (MOST / u32::from(largest.max(1))).min(254) as u8;
        for (at, to) in singles.iter_mut().enumerate() {
            *to = limit(word(at).iter().fold(0, |most, &byte| byte.max(most)));
        }
        let (low, high) = singles.split_at(half);
        for ((to, low), high) in doubles.iter_mut().zip(low).zip(high) {
            *to = *low.min(high);
        }
        return;
    }
    // Of a column, the sums of two weights' positive and negative parts. By shifts, which vectors of the lowest rung have.
    let parts = |pair: &[u8; 2]| {
        let pair = i16::from_le_bytes(*pair);
        let (a, b) = (pair << 8 >> 8, pair >> 8);
        [a.max(0) + b.max(0), -(a.min(0) + b.min(0))]
    };
    let limit = |sums: &[[i16; 2]]| {
        let largest = sums.as_flattened().iter().fold(0, |most, &sum| i16::max(most, sum));
        (MOST / largest.max(1) as u32).min(255) as u8
    };
    // Two sums for each of a panel's columns at most: loops over arrays, of which the compiler makes vectors.
    let mut sums = [[0; 2]; 2 * 32];
    let sums = &mut sums[..2 * width];
    for (at, to) in singles.iter_mut().enumerate() {
        sums.iter_mut().zip(word(at).as_chunks().0).for_each(|(sum, pair)| *sum = parts(pair));
        *to = limit(sums);
    }
    for (at, to) in doubles.iter_mut().enumerate() {
        let both = word(at).as_chunks().0.iter().zip(word(half + at).as_chunks().0);
        for (sum, (low, high)) in sums.iter_mut().zip(both) {
            let (low, high) = (parts(low), parts(high));
            *sum = [low[0] + high[0], low[1] + high[1]];
        }
        *to = limit(sums);
    }
}

/// Measures of a block of gathered rows, as [`limit`] lays the limits out, and what each row's sum starts from.
pub(super) struct Measures<'a> {
    of: &'a [u8],
    pub starts: [i32; MOST_ROWS],
}

/// Most rows of a block.
pub(super) const MOST_ROWS: usize = 8 * super::BLOCK_TILES;

/// Measures `rows` of `words` words each.
#[inline(always)]
pub(super) fn measure<'a, I: Isa>(
    isa: I,
    centred: bool,
    rows: &[u8],
    words: usize,
    workspace: &'a mut [f32],
) -> (Measures<'a>, &'a mut [u32]) {
    let (bytes, lists) = workspace.split_at_mut(workspace_len(words) - 4 * words);
    // SAFETY: any bits are bytes, and integers.
    let (bytes, lists) = unsafe { (bytes.align_to_mut::<u8>().1, lists.align_to_mut::<u32>().1) };
    let (measures, scratch) = bytes.split_at_mut(limits_len(words));
    let mut starts = [0; MOST_ROWS];
    let rows = rows.chunks_exact(4 * words.max(1));
    match centred {
        true => measure_centred(isa, rows, words, measures, scratch, &mut starts),
        false => measure_unsigned(rows, words, measures, scratch),
    }
    (Measures { of: measures, starts }, lists)
}

/// The largest byte of every word, and of every two that belong together.
#[inline(always)]
fn measure_unsigned<'r>(rows: impl Iterator<Item = &'r [u8]>, words: usize, measures: &mut [u8], scratch: &mut [u8]) {
    let largest = &mut scratch[..4 * words];
    largest.fill(0);
    for row in rows {
        for (largest, &x) in largest.iter_mut().zip(row) {
            *largest = x.max(*largest);
        }
    }
    let (singles, doubles) = measures.split_at_mut(words);
    for (to, of) in singles.iter_mut().zip(largest.as_chunks::<4>().0) {
        *to = of[0].max(of[1]).max(of[2].max(of[3]));
    }
    let (low, high) = singles.split_at(words / 2);
    for ((to, &a), &b) in doubles.iter_mut().zip(low).zip(high) {
        *to = a.max(b);
    }
}

/// The largest sum of signed bytes of one sign that comes to be added in 16 bits, of every word and of every two; and 128 times the sum of each row, negative.
#[inline(always)]
fn measure_centred<'r, I: Isa>(
    isa: I,
    rows: impl Iterator<Item = &'r [u8]>,
    words: usize,
    measures: &mut [u8],
    scratch: &mut [u8],
    starts: &mut [i32],
) {
    let array = 4 * room(words);
    let scratch = &mut scratch[..SCRATCH * room(words)];
    scratch.fill(0);
    let (parts, largest) = scratch.split_at_mut(2 * array);
    let (positive, negative) = parts.split_at_mut(array);
    let (singles, doubles) = largest.split_at_mut(array);
    let (half, ones, one_halves) = (words / 2, isa.splat_w(ONES), isa.splat_w(ONE_HALVES));
    for (row, start) in rows.zip(starts) {
        for ((&x, positive), negative) in row.iter().zip(&mut *positive).zip(&mut *negative) {
            let x = x as i8;
            *positive = x.max(0) as u8;
            *negative = (x.max(0) as u8).wrapping_sub(x as u8);
        }
        let [positive, negative] = [&*positive, &*negative].map(|part| part.as_ptr().cast::<i32>());
        let mut sum = [isa.splat_w(0); 2];
        // SAFETY: a vector's lanes, 16 at most, past every word below `words` are inside the arrays.
        unsafe {
            for word in (0..words).step_by(I::LANES) {
                let to = singles.as_mut_ptr().cast::<i32>().add(word);
                let mut most = isa.load_w(to);
                for (part, sum) in [positive, negative].into_iter().zip(&mut sum) {
                    let two = isa.pairs(isa.load_w(part.add(word)), ones);
                    most = isa.max_halves(most, two);
                    *sum = isa.dot2(*sum, two, one_halves);
                }
                isa.store_w(to, most);
            }
            for word in (0..half).step_by(I::LANES) {
                let to = doubles.as_mut_ptr().cast::<i32>().add(word);
                let mut most = isa.load_w(to);
                for part in [positive, negative] {
                    let [low, high] = [word, half + word].map(|at| isa.pairs(isa.load_w(part.add(at)), ones));
                    most = isa.max_halves(most, isa.add_halves(low, high));
                }
                isa.store_w(to, most);
            }
        }
        let [positive, negative] = sum.map(|sum| isa.to_lanes_w(sum)[..I::LANES].iter().sum::<i32>());
        *start = positive.wrapping_sub(negative).wrapping_mul(-128);
    }
    let of = |halves: &[u8; 4]| {
        let [a, b, c, d] = *halves;
        u16::from_le_bytes([a, b]).max(u16::from_le_bytes([c, d])).min(255) as u8
    };
    let sums = singles.as_chunks::<4>().0[..words].iter().chain(&doubles.as_chunks::<4>().0[..half]);
    for (to, halves) in measures.iter_mut().zip(sums) {
        *to = of(halves);
    }
}

/// Words by the way in which they are multiplied.
pub(super) struct Steps<'a> {
    /// With the one half of the words further on, before anything is widened.
    doubles: &'a [u32],
    /// Alone.
    singles: &'a [u32],
    /// Product by product.
    halves: &'a [u32],
}

impl Measures<'_> {
    /// What the measures allow in a panel of these limits.
    #[inline(always)]
    pub(super) fn steps<'a>(&self, limits: &[u8], words: usize, lists: &'a mut [u32]) -> Steps<'a> {
        let half = words / 2;
        let (doubles, others) = lists.split_at_mut(half);
        let (singles, others) = others.split_at_mut(words);
        let (halves, rest) = others.split_at_mut(words);
        let rest = &mut rest[..half];
        let (measures, limits) = (&self.of[..limits_len(words)], &limits[..limits_len(words)]);
        let (mut double, mut single, mut split, mut left) = (0, 0, 0, 0);
        // Without branches, which would be foreseen as badly as the values.
        for (word, (measure, limit)) in measures[words..].iter().zip(&limits[words..]).enumerate() {
            let fits = measure <= limit;
            (doubles[double], rest[left]) = (word as u32, word as u32);
            double += usize::from(fits);
            left += usize::from(!fits);
        }
        for word in rest[..left].iter().flat_map(|&word| [word as usize, word as usize + half]) {
            let fits = measures[word] <= limits[word];
            (singles[single], halves[split]) = (word as u32, word as u32);
            single += usize::from(fits);
            split += usize::from(!fits);
        }
        Steps { doubles: &doubles[..double], singles: &singles[..single], halves: &halves[..split] }
    }
}

/// As `multiply` in `tile.rs` of bytes, by steps that the values allow. Of the centred ones the panel's bytes are unsigned and A's signed.
///
/// # Safety
/// `ROWS` rows of `words` words are readable at `a`, `words` of as many as a panel's columns at `b`, the steps are of as many words; `[row][2][LANES]` are writable at `sums`.
#[inline(always)]
pub(super) unsafe fn multiply<I: Isa, const ROWS: usize, const VECTORS: usize, const CENTRED: bool>(
    isa: I,
    a: *const i32,
    words: usize,
    b: *const i32,
    (starts, row_starts): (&[i32; 32], &[i32]),
    steps: &Steps<'_>,
    sums: *mut i32,
) {
    let ones = isa.splat_w(ONE_HALVES);
    // SAFETY: the caller; a panel has as many columns as two vectors have lanes, 32 at most.
    unsafe {
        let mut tile = [[isa.splat_w(0); VECTORS]; ROWS];
        let columns = |word: usize| {
            let mut columns = [isa.splat_w(0); VECTORS];
            for v in 0..VECTORS {
                columns[v] = isa.load_w(b.add((word * 2 + v) * I::LANES));
            }
            columns
        };
        let value = |row: usize, word: usize| isa.splat_w(a.add(row * words + word).read());
        let pairs = |x: I::W, y: I::W| if CENTRED { isa.pairs(y, x) } else { isa.pairs(x, y) };
        for &word in steps.doubles {
            let at = [word as usize, word as usize + words / 2];
            let [low, high] = at.map(columns);
            for r in 0..ROWS {
                // Else the compiler reads all rows' values first, for which there are too few registers.
                compiler_fence(Ordering::SeqCst);
                let [x, y] = at.map(|word| value(r, word));
                for v in 0..VECTORS {
                    let both = isa.add_halves(pairs(x, low[v]), pairs(y, high[v]));
                    tile[r][v] = isa.dot2(tile[r][v], both, ones);
                }
            }
        }
        for &word in steps.singles {
            let columns = columns(word as usize);
            for r in 0..ROWS {
                let x = value(r, word as usize);
                for v in 0..VECTORS {
                    tile[r][v] = isa.dot2(tile[r][v], pairs(x, columns[v]), ones);
                }
            }
        }
        // One product of a byte and a signed one alone fits: the first of each two, and the second.
        let first = isa.splat_w(0x00ff_00ff);
        for &word in steps.halves {
            let columns = columns(word as usize);
            for v in 0..VECTORS {
                let even = isa.and_w(columns[v], first);
                for part in [even, isa.xor_w(columns[v], even)] {
                    for r in 0..ROWS {
                        tile[r][v] = isa.dot2(tile[r][v], pairs(value(r, word as usize), part), ones);
                    }
                }
            }
        }
        for r in 0..ROWS {
            let row = isa.splat_w(if CENTRED { row_starts[r] } else { 0 });
            for v in 0..VECTORS {
                let start = isa.add_w(isa.load_w(starts.as_ptr().add(v * I::LANES)), row);
                isa.store_w(sums.add((r * 2 + v) * I::LANES), isa.add_w(tile[r][v], start));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::dispatch::{Kernel, dispatch};
    use super::super::super::testing::*;
    use super::*;

    struct Sort<'a> {
        centred: bool,
        rows: &'a [u8],
        limits: &'a [u8],
        words: usize,
    }

    impl Kernel for Sort<'_> {
        type Output = [Vec<u32>; 3];
        const OF_BYTES: bool = true;

        #[inline(always)]
        fn eval<I: Isa>(self, isa: I) -> [Vec<u32>; 3] {
            let mut workspace = vec![0.0; workspace_len(self.words)];
            let (measures, lists) = measure(isa, self.centred, self.rows, self.words, &mut workspace);
            let steps = measures.steps(self.limits, self.words, lists);
            [steps.doubles, steps.singles, steps.halves].map(<[u32]>::to_vec)
        }
    }

    /// No sum of 16 bits that a step makes of these rows and columns leaves `i16`; every word has its step, and every kind of step comes up.
    #[test]
    fn no_step_saturates() {
        for level in levels() {
            let mut random = Random::new(61);
            let mut seen = [[0; 3]; 2];
            for round in rounds(200) {
                let (centred, words, width) = (round % 2 == 1, 2 * random.between(1, 20), 16);
                let (wide, about) =
                    (random.pick(&[128, 80, 30, 10]), if centred { 0 } else { random.pick(&[0, 60, 128]) });
                let heavy = random.pick(&[127, 60, 20]);
                let within = |random: &mut Random, most: i32| random.between(0, 2 * most as usize) as i32 - most;
                let rows: Vec<u8> = (0..random.between(1, 9) * 4 * words)
                    .map(|_| (about + within(&mut random, wide)).clamp(if centred { -128 } else { 0 }, 255) as u8)
                    .collect();
                let weights: Vec<[i8; 4]> =
                    (0..words * width).map(|_| [(); 4].map(|()| within(&mut random, heavy) as i8)).collect();
                let flip = if centred { 0x80 } else { 0 };
                let panel: Vec<u8> = weights.as_flattened().iter().map(|&w| w as u8 ^ flip).collect();
                let mut limits = vec![0; limits_len(words)];
                limit(&panel, width, words, centred, &mut limits);
                let steps = dispatch(level, Sort { centred, rows: &rows, limits: &limits, words });
                let half = words / 2;
                let products = |row: &[u8], word: usize, column: usize| -> [i32; 4] {
                    let weights = &panel[4 * (word * width + column)..];
                    std::array::from_fn(|i| match (row[4 * word + i], weights[i]) {
                        (x, w) if centred => i32::from(x as i8) * i32::from(w),
                        (x, w) => i32::from(x) * i32::from(w as i8),
                    })
                };
                let sums = |[a, b, c, d]: [i32; 4]| [a + b, c + d];
                let fits = |sum: i32| assert!(i16::try_from(sum).is_ok(), "{sum} {} {centred}", level.name());
                for row in rows.chunks_exact(4 * words) {
                    for column in 0..width {
                        let [doubles, singles, halves] =
                            steps.each_ref().map(|list| list.iter().map(|&word| word as usize));
                        for word in doubles {
                            let [low, high] = [word, word + half].map(|word| sums(products(row, word, column)));
                            low.into_iter().chain(high).for_each(fits);
                            low.into_iter().zip(high).for_each(|(low, high)| fits(low + high));
                        }
                        singles.flat_map(|word| sums(products(row, word, column))).for_each(fits);
                        halves.flat_map(|word| products(row, word, column)).for_each(fits);
                    }
                }
                let mut all = steps.concat();
                all.extend(steps[0].iter().map(|word| word + half as u32));
                all.sort_unstable();
                assert!(all.iter().copied().eq(0..words as u32), "{all:?} of {words}");
                for (seen, list) in seen[usize::from(centred)].iter_mut().zip(&steps) {
                    *seen += list.len();
                }
            }
            if rounds(200).len() == 200 {
                assert!(seen.as_flattened().iter().all(|&count| count > 0), "{seen:?}");
            }
        }
    }
}
