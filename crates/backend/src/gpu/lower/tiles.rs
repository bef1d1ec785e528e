//! How products are dealt out on devices that have memory near a group of invocations: tiles that the group shares, and registers for the
//! sums of several rows and columns an invocation. What is best depends on the device: there are a few forms, of which a driver may choose.

use super::super::plan::{Builder, Main};
use cutover_kernels::wgsl;

/// A tile of `down · rows` by `across · columns`, `depth` terms at a time.
struct Tile {
    /// Of an invocation.
    rows: usize,
    columns: usize,
    /// Invocations of a group.
    down: usize,
    across: usize,
    depth: usize,
}

/// 32 by 32, 64 by 64 and 128 by 128: up to 9 KiB, which every device has (16 KiB).
const TILES: [Tile; 3] = [
    Tile { rows: 4, columns: 4, down: 8, across: 8, depth: 16 },
    Tile { rows: 4, columns: 4, down: 16, across: 16, depth: 16 },
    Tile { rows: 8, columns: 8, down: 16, across: 16, depth: 8 },
];

impl Tile {
    fn extent(&self) -> [usize; 2] {
        [self.down * self.rows, self.across * self.columns]
    }

    fn main(&self, [m, n, k, matrices]: [usize; 4]) -> Main {
        let [height, width] = self.extent();
        // One more, so that neighbours do not meet in one bank.
        let stride = height + 1;
        let numbers = [
            ("ROWS", self.rows),
            ("COLUMNS", self.columns),
            ("ACROSS", self.across),
            ("GROUP", self.across * self.down),
            ("TILE_M", height),
            ("TILE_N", width),
            ("TILE_K", self.depth),
            ("A_STRIDE", stride),
            ("A_HELD", self.depth * stride),
            ("B_HELD", self.depth * width),
            ("M", m),
            ("N", n),
            ("K", k),
            ("LAST_ROW", m - 1),
        ];
        let parameters: Vec<_> = numbers.into_iter().map(|(name, value)| (name, value.to_string())).collect();
        let groups = [n.div_ceil(width), m.div_ceil(height), matrices].map(|n| n as u32);
        Main { text: wgsl::expand(wgsl::PRODUCT_TILES, &parameters), groups }
    }
}

/// The ways to a product of `m` by `n` sums of `k` terms, `matrices` of them, whose factors are `a_at(z, m, k)` and `b_at(z, k, n)`: the one that
/// is best by its sizes first. Of products that fill no tile there are none.
pub(super) fn ways(b: &Builder<'_>, [m, n, k, matrices]: [usize; 4]) -> Vec<Main> {
    if b.gpu.has_lanes || b.gpu.is_imitated || b.gpu.written.is_some() || m < 8 || n < 16 || k < 8 {
        return Vec::new();
    }
    let mut ways: Vec<(usize, &Tile)> = Vec::new();
    for tile in TILES.iter().filter(|tile| tile.across * tile.down <= b.gpu.invocations) {
        let [height, width] = tile.extent();
        let groups = m.div_ceil(height) * n.div_ceil(width) * matrices;
        // What is computed, what is outside included, by as many groups as a device has in work at once; large tiles load less for it.
        let work = groups.max(32) * height * width;
        ways.push((work + work * 16 / height.min(width), tile));
    }
    ways.sort_by_key(|(work, _)| *work);
    ways.into_iter().map(|(_, tile)| tile.main([m, n, k, matrices])).collect()
}
