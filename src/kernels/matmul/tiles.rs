//! Quantized weights in tiles of 16 rows, the layout that the kernels read.
//!
//! A ggml row keeps a block's quants, scale and minimum together, so a dot product ends in sums across a
//! register and the unpacking of scales is paid for each row. A tile holds the same bits of 16 rows side by
//! side: a register holds the same column of 16 rows, one scale is unpacked for all of them, and a thread reads
//! one straight stream. The bytes of a tile are those of its 16 rows in another order; nothing is lost or added.
//!
//! Tiles of a matrix follow one another, rows 0..16 first; in a tile the blocks follow one another, first
//! columns first. A block's parts, for 16 rows each; `quads` are four neighbouring columns, and a *line* is 64
//! bytes, (16 rows, 4 columns):
//!
//! | type | columns | parts |
//! |---|---|---|
//! | Q8_0 | 32 | d f16; 8 lines of one quad |
//! | Q4_0, IQ4_NL | 32 | d f16; 4 lines of two quads: line l has quad 2l in its low nibbles, 2l+1 in its high ones |
//! | Q4_K | 256 | d f16; dmin f16; bytes 0..4, 4..8, 8..12 of the packed scales; 32 lines of nibbles as above |
//! | Q5_K | 256 | as Q4_K, then 8 lines of fifth bits: bit i of line j belongs to quad i of columns 32j..32j+32 |
//! | Q6_K | 256 | d f16; 16 scales i8; 32 lines of low nibbles; 16 lines of bit pairs: pair i of line j belongs to quad i of columns 16j..16j+16 |

use crate::dtype::DType;

/// Rows of a tile.
pub const ROWS: usize = 16;

/// A part of a tile's block, by where its bits are in a row's block.
enum Part {
    /// `count` items of `bytes` bytes from `at` on; a tile has item 0 of all rows, then item 1, …
    Items { at: usize, bytes: usize, count: usize },
    /// `bits` bits of each column: a tile's line holds 8 / `bits` quads. `place` finds a column's bits in a row.
    Columns { bits: usize, count: usize, place: fn(usize) -> Place },
}

/// Where some bits of a column are in a row's block.
struct Place {
    byte: usize,
    shift: usize,
}

use Part::{Columns, Items};

/// The parts of `dtype`'s blocks; empty where the type has no tiles.
const fn parts(dtype: DType) -> &'static [Part] {
    match dtype {
        DType::Q8_0 => &[
            Items { at: 0, bytes: 2, count: 1 },
            Columns { bits: 8, count: 32, place: |c| Place { byte: 2 + c, shift: 0 } },
        ],
        DType::Q4_0 | DType::IQ4_NL => &[
            Items { at: 0, bytes: 2, count: 1 },
            Columns { bits: 4, count: 32, place: |c| Place { byte: 2 + c % 16, shift: c / 16 * 4 } },
        ],
        DType::Q4_K => &[
            Items { at: 0, bytes: 2, count: 2 },
            Items { at: 4, bytes: 4, count: 3 },
            Columns {
                bits: 4,
                count: 256,
                place: |c| Place { byte: 16 + c / 64 * 32 + c % 32, shift: c / 32 % 2 * 4 },
            },
        ],
        DType::Q5_K => &[
            Items { at: 0, bytes: 2, count: 2 },
            Items { at: 4, bytes: 4, count: 3 },
            Columns {
                bits: 4,
                count: 256,
                place: |c| Place { byte: 48 + c / 64 * 32 + c % 32, shift: c / 32 % 2 * 4 },
            },
            Columns { bits: 1, count: 256, place: |c| Place { byte: 16 + c % 32, shift: c / 32 } },
        ],
        DType::Q6_K => &[
            Items { at: 208, bytes: 2, count: 1 },
            Items { at: 192, bytes: 1, count: 16 },
            Columns {
                bits: 4,
                count: 256,
                place: |c| Place { byte: c / 128 * 64 + c % 64, shift: c / 64 % 2 * 4 },
            },
            Columns {
                bits: 2,
                count: 256,
                place: |c| Place { byte: 128 + c / 128 * 32 + c % 32, shift: c / 32 % 4 * 2 },
            },
        ],
        _ => &[],
    }
}

/// Whether matrices of `dtype` have a tiled layout.
pub fn tileable(dtype: DType) -> bool {
    !parts(dtype).is_empty()
}

/// Whether a file that is in tile order has a matrix of `rows` rows of `dtype` in tile order: whole tiles only.
pub fn stored_in_tiles(dtype: DType, rows: usize) -> bool {
    tileable(dtype) && rows.is_multiple_of(ROWS)
}

/// Puts 16 rows of `dtype`, `rows`, into tile order. Both slices have the same length: 16 rows of whole blocks.
///
/// Panics if the lengths differ, are not 16 rows of whole blocks, or the type is not [`tileable`].
pub fn to_tile(dtype: DType, rows: &[u8], tile: &mut [u8]) {
    tile.fill(0);
    permute(dtype, rows.len(), |row, in_row, in_tile, mask| {
        let bits = rows[row + in_row.byte] >> in_row.shift & mask;
        tile[in_tile.byte] |= bits << in_tile.shift;
    });
    assert_eq!(rows.len(), tile.len(), "a tile has the bytes of its rows");
}

/// Puts row `r` of a tile back into ggml's order.
///
/// Panics as [`to_tile`] does; `row` has a sixteenth of the tile's bytes.
pub fn row_of_tile(dtype: DType, tile: &[u8], r: usize, row: &mut [u8]) {
    row.fill(0);
    let row_bytes = row.len();
    permute_row(dtype, tile.len(), r, &mut |start, in_row, in_tile, mask| {
        let bits = tile[in_tile.byte] >> in_tile.shift & mask;
        row[start - r * row_bytes + in_row.byte] |= bits << in_row.shift;
    });
}

/// Calls `visit(start of the row's block, place in the row's block, place in the tile, mask)` for all bits.
fn permute(dtype: DType, bytes: usize, mut visit: impl FnMut(usize, Place, Place, u8)) {
    for r in 0..ROWS {
        permute_row(dtype, bytes, r, &mut visit);
    }
}

fn permute_row(dtype: DType, bytes: usize, r: usize, visit: &mut impl FnMut(usize, Place, Place, u8)) {
    let block = dtype.block_bytes() as usize;
    assert!(tileable(dtype) && bytes.is_multiple_of(ROWS * block), "a tile is 16 rows of whole blocks");
    let row_bytes = bytes / ROWS;
    for b in 0..row_bytes / block {
        let start = r * row_bytes + b * block;
        let mut part_start = b * block * ROWS;
        for part in parts(dtype) {
            match *part {
                Items { at, bytes, count } => {
                    for i in 0..count * bytes {
                        let byte = part_start + (i / bytes * ROWS + r) * bytes + i % bytes;
                        visit(start, Place { byte: at + i, shift: 0 }, Place { byte, shift: 0 }, 0xFF);
                    }
                    part_start += count * bytes * ROWS;
                }
                Columns { bits, count, place } => {
                    let quads = 8 / bits; // in a line
                    for c in 0..count {
                        let (line, quad) = (c / (4 * quads), c / 4 % quads);
                        let in_tile =
                            Place { byte: part_start + line * 64 + r * 4 + c % 4, shift: quad * bits };
                        visit(start, place(c), in_tile, ((1u16 << bits) - 1) as u8);
                    }
                    part_start += count * bits / 8 * ROWS;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tile_has_every_bit_of_its_rows() {
        for dtype in DType::ALL.into_iter().filter(|&dtype| tileable(dtype)) {
            let row_bytes = 3 * dtype.block_bytes() as usize;
            let rows: Vec<u8> = (0..ROWS * row_bytes).map(|i| (i * 151 % 251) as u8).collect();
            let mut tile = vec![0; rows.len()];
            to_tile(dtype, &rows, &mut tile);
            assert_ne!(rows, tile);
            let mut back = vec![0; row_bytes];
            for (r, row) in rows.chunks(row_bytes).enumerate() {
                row_of_tile(dtype, &tile, r, &mut back);
                assert_eq!(back, row, "{dtype}, row {r}");
            }
        }
    }
}
