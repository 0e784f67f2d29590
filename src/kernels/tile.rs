//! f32 matrix products in register tiles.

use super::simd::Simd;

/// A matrix product computed in tiles of R rows and C registers of columns.
pub(crate) trait Tile {
    /// Computes the tile whose first element is (row, column).
    unsafe fn tile<S: Simd, const R: usize, const C: usize>(&self, row: usize, column: usize);
}

/// Covers a (rows, columns) result with tiles. `columns` is a whole number of registers.
#[inline(always)]
pub(crate) unsafe fn tiles<S: Simd>(rows: usize, columns: usize, product: &impl Tile) {
    // SAFETY: the tiles cover the result exactly.
    unsafe {
        if S::MANY_REGISTERS {
            tiles_of::<S, 6, 4>(rows, columns, product)
        } else {
            tiles_of::<S, 4, 2>(rows, columns, product)
        }
    }
}

#[inline(always)]
unsafe fn tiles_of<S: Simd, const R: usize, const C: usize>(
    rows: usize,
    columns: usize,
    product: &impl Tile,
) {
    let mut column = 0;
    // SAFETY: as above.
    unsafe {
        while column < columns {
            let wide = column + C * S::LANES <= columns;
            let mut row = 0;
            while row < rows {
                match (row + R <= rows, wide) {
                    (true, true) => product.tile::<S, R, C>(row, column),
                    (true, false) => product.tile::<S, R, 1>(row, column),
                    (false, true) => product.tile::<S, 1, C>(row, column),
                    (false, false) => product.tile::<S, 1, 1>(row, column),
                }
                row += if row + R <= rows { R } else { 1 };
            }
            column += if wide { C * S::LANES } else { S::LANES };
        }
    }
}

/// `sums[r][c] += Σ a[r][i] b[i][c]` for i below `inner`; a has `a_stride` floats a row, b has `b_stride`.
#[inline(always)]
pub(crate) unsafe fn accumulate<S: Simd, const R: usize, const C: usize>(
    sums: &mut [[S::V; C]; R],
    (a, a_stride): (*const f32, usize),
    (b, b_stride): (*const f32, usize),
    inner: usize,
) {
    for i in 0..inner {
        // SAFETY: the caller's promise.
        unsafe {
            let mut row = [S::splat(0.0); C];
            for (c, row) in row.iter_mut().enumerate() {
                *row = S::load(b.add(i * b_stride + c * S::LANES));
            }
            for (r, sums) in sums.iter_mut().enumerate() {
                let x = S::splat(*a.add(r * a_stride + i));
                for c in 0..C {
                    sums[c] = S::fma(x, row[c], sums[c]);
                }
            }
        }
    }
}
