//! The table of contents of a zip file whose entries are stored, not compressed: what `torch.save` writes.

use std::collections::HashMap;

use transnormer::error::Result;

use super::source::SourceFile;

const END_SIGNATURE: u32 = 0x0605_4b50;
const END64_SIGNATURE: u32 = 0x0606_4b50;
const END64_LOCATOR_SIGNATURE: u32 = 0x0706_4b50;
const CENTRAL_SIGNATURE: u32 = 0x0201_4b50;
const LOCAL_SIGNATURE: u32 = 0x0403_4b50;

const END_LEN: u64 = 22;
const END64_LEN: u64 = 56;
const LOCATOR_LEN: u64 = 20;
const CENTRAL_LEN: usize = 46;
const LOCAL_LEN: u64 = 30;
/// Extra field that holds the 64-bit sizes of an entry.
const ZIP64_EXTRA: u16 = 1;
/// Size limit of the table of contents; a 7B shard's has some ten kilobytes.
const MAX_CENTRAL: u64 = 16 << 20;

/// Where the bytes of a stored entry lie in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Position of the first byte.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
}

/// The entries of the zip file, by name.
///
/// # Errors
/// One line that names the file and the entry: no or a damaged table of contents, an entry that is
/// compressed, encrypted, listed twice, outside the file, or named like a path that leaves its folder.
pub fn read(file: &SourceFile) -> Result<HashMap<String, Entry>> {
    let (count, offset, len) = locate_central_directory(file)?;
    if len > MAX_CENTRAL || count > len / CENTRAL_LEN as u64 {
        return Err(file.error(format_args!("invalid zip: {count} entries in a table of {len} bytes")));
    }
    let table = file.read_vec_at(offset, len)?;
    let mut rest = Bytes(&table);
    let mut entries = HashMap::new();
    let mut total = 0_u64;
    for _ in 0..count {
        let (name, entry) = read_entry(file, &mut rest)?;
        // Stored entries cannot expand; together larger than the file, they must overlap.
        total = total.saturating_add(entry.len);
        if total > file.size() {
            return Err(file.error("invalid zip: the entries overlap"));
        }
        if entries.insert(name.clone(), entry).is_some() {
            return Err(file.error(format_args!("invalid zip: entry {name:?} appears twice")));
        }
    }
    Ok(entries)
}

/// Number of entries, offset and length of the table of contents.
fn locate_central_directory(file: &SourceFile) -> Result<(u64, u64, u64)> {
    let missing =
        || file.error("no zip table of contents at the end: the file is cut off, download it again");
    // The end record is last, followed only by a comment of up to 65,535 bytes.
    let tail_len = file.size().min(END_LEN + u64::from(u16::MAX));
    let tail_start = file.size() - tail_len;
    let tail = file.read_vec_at(tail_start, tail_len)?;
    let position = (0..tail.len().saturating_sub(END_LEN as usize - 1))
        .rev()
        .find(|&at| {
            let mut end = Bytes(&tail[at..]);
            let comment = || Bytes(&tail[at + 20..]).u16();
            end.u32() == Some(END_SIGNATURE)
                && comment().is_some_and(|len| at + END_LEN as usize + usize::from(len) == tail.len())
        })
        .ok_or_else(missing)?;
    let end_at = tail_start + position as u64;

    if let Some(locator_at) = end_at.checked_sub(LOCATOR_LEN) {
        let locator = file.read_vec_at(locator_at, LOCATOR_LEN)?;
        let mut locator = Bytes(&locator);
        if locator.u32() == Some(END64_LOCATOR_SIGNATURE) {
            let end64_at = locator.skip(4).and_then(|()| locator.u64()).ok_or_else(missing)?;
            let end64 = file.read_vec_at(end64_at, END64_LEN)?;
            return parse_end64(&end64).ok_or_else(|| file.error("invalid zip: damaged 64-bit end record"));
        }
    }
    parse_end(&tail[position..]).ok_or_else(missing)
}

fn parse_end(bytes: &[u8]) -> Option<(u64, u64, u64)> {
    let mut end = Bytes(bytes);
    end.skip(10)?;
    let (count, len, offset) = (end.u16()?, end.u32()?, end.u32()?);
    Some((count.into(), offset.into(), len.into()))
}

fn parse_end64(bytes: &[u8]) -> Option<(u64, u64, u64)> {
    let mut end = Bytes(bytes);
    if end.u32()? != END64_SIGNATURE {
        return None;
    }
    end.skip(28)?;
    let (count, len, offset) = (end.u64()?, end.u64()?, end.u64()?);
    Some((count, offset, len))
}

/// Fields of one record of the table of contents.
struct Central<'a> {
    flags: u16,
    method: u16,
    compressed: u64,
    uncompressed: u64,
    local_offset: u64,
    name: &'a [u8],
}

fn read_entry(file: &SourceFile, table: &mut Bytes<'_>) -> Result<(String, Entry)> {
    let central = parse_central(table).ok_or_else(|| file.error("invalid zip: damaged table of contents"))?;
    let name = std::str::from_utf8(central.name)
        .ok()
        .filter(|name| !name.starts_with('/') && !name.split(['/', '\\']).any(|part| part == ".."))
        .ok_or_else(|| {
            let name = String::from_utf8_lossy(central.name);
            file.error(format_args!("invalid zip: entry name {name:?} is not a plain relative path"))
        })?;
    if central.flags & 1 != 0 {
        return Err(file.error(format_args!("entry {name:?} is encrypted")));
    }
    if central.method != 0 || central.compressed != central.uncompressed {
        return Err(file.error(format_args!(
            "entry {name:?} is compressed, which torch.save never does: save the checkpoint again"
        )));
    }
    // Name and extra field may differ in length between the two copies of the header.
    let local = file.read_vec_at(central.local_offset, LOCAL_LEN)?;
    let header_len = parse_local_len(&local)
        .ok_or_else(|| file.error(format_args!("invalid zip: entry {name:?} has no header")))?;
    let entry = Entry { offset: central.local_offset + header_len, len: central.uncompressed };
    match entry.offset.checked_add(entry.len) {
        Some(end) if end <= file.size() => Ok((name.to_owned(), entry)),
        _ => Err(file.error(format_args!("entry {name:?} lies beyond the end of the file"))),
    }
}

fn parse_central<'a>(table: &mut Bytes<'a>) -> Option<Central<'a>> {
    if table.u32()? != CENTRAL_SIGNATURE {
        return None;
    }
    table.skip(4)?;
    let (flags, method) = (table.u16()?, table.u16()?);
    table.skip(8)?;
    let (compressed, uncompressed) = (table.u32()?, table.u32()?);
    let (name_len, extra_len, comment_len) = (table.u16()?, table.u16()?, table.u16()?);
    table.skip(8)?;
    let local_offset = table.u32()?;
    let name = table.take(name_len.into())?;
    let extra = table.take(extra_len.into())?;
    table.skip(comment_len.into())?;

    let mut wide = Bytes(zip64_extra(extra));
    // A 64-bit value is present exactly for each 32-bit field that is saturated, in this order.
    let mut widen = |field: u32| if field == u32::MAX { wide.u64() } else { Some(field.into()) };
    let (uncompressed, compressed, local_offset) =
        (widen(uncompressed)?, widen(compressed)?, widen(local_offset)?);
    Some(Central { flags, method, compressed, uncompressed, local_offset, name })
}

/// The payload of the 64-bit extra field, empty if there is none.
fn zip64_extra(extra: &[u8]) -> &[u8] {
    let mut rest = Bytes(extra);
    while let (Some(id), Some(len)) = (rest.u16(), rest.u16()) {
        match rest.take(len.into()) {
            Some(payload) if id == ZIP64_EXTRA => return payload,
            Some(_) => {}
            None => break,
        }
    }
    &[]
}

fn parse_local_len(bytes: &[u8]) -> Option<u64> {
    let mut local = Bytes(bytes);
    if local.u32()? != LOCAL_SIGNATURE {
        return None;
    }
    local.skip(22)?;
    Some(LOCAL_LEN + u64::from(local.u16()?) + u64::from(local.u16()?))
}

/// Little-endian fields taken off the front of a slice.
struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(len)?;
        self.0 = tail;
        Some(head)
    }

    fn skip(&mut self, len: usize) -> Option<()> {
        self.take(len).map(drop)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, tail) = self.0.split_first_chunk()?;
        self.0 = tail;
        Some(*head)
    }

    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }
}

/// A writer of small zip files for tests.
#[cfg(test)]
pub(super) mod fixture {
    /// A zip file of stored entries; `tweak` may damage (central header, its index) before it is written.
    pub fn zip_with(entries: &[(&str, &[u8])], tweak: impl Fn(usize, &mut Vec<u8>)) -> Vec<u8> {
        let (mut file, mut table) = (Vec::new(), Vec::new());
        for (index, (name, data)) in entries.iter().enumerate() {
            let local_offset = file.len() as u32;
            let sizes = [(data.len() as u32).to_le_bytes(), (data.len() as u32).to_le_bytes()].concat();
            let lens = [(name.len() as u16).to_le_bytes(), 0_u16.to_le_bytes()].concat();
            file.extend([&b"PK\x03\x04"[..], &[0; 14], &sizes, &lens, name.as_bytes(), data].concat());
            let mut central = [&b"PK\x01\x02"[..], &[0; 16], &sizes, &lens, &[0; 10]].concat();
            central.extend(local_offset.to_le_bytes());
            central.extend(name.as_bytes());
            tweak(index, &mut central);
            table.extend(central);
        }
        let (offset, count) = (file.len() as u32, entries.len() as u16);
        file.extend(&table);
        file.extend([&b"PK\x05\x06"[..], &[0; 4], &count.to_le_bytes(), &count.to_le_bytes()].concat());
        file.extend([(table.len() as u32).to_le_bytes(), offset.to_le_bytes()].concat());
        file.extend([0; 2]);
        file
    }
}

#[cfg(test)]
mod tests {
    use super::{fixture::zip_with, *};

    fn read_bytes(bytes: &[u8]) -> Result<HashMap<String, Entry>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.bin");
        std::fs::write(&path, bytes).unwrap();
        read(&SourceFile::open(&path).unwrap())
    }

    const TWO: [(&str, &[u8]); 2] = [("a/x", b"hello"), ("a/y", b"world!")];

    #[test]
    fn finds_the_bytes_of_every_entry() {
        let zip = zip_with(&TWO, |_, _| {});
        let entries = read_bytes(&zip).unwrap();
        assert_eq!(entries.len(), 2);
        for (name, data) in TWO {
            let Entry { offset, len } = entries[name];
            assert_eq!(&zip[offset as usize..(offset + len) as usize], data);
        }
    }

    #[test]
    fn reads_64_bit_sizes() {
        let zip = zip_with(&TWO, |index, central| {
            if index == 1 {
                let sizes: Vec<u8> = central[20..24].to_vec();
                central[20..28].fill(0xff);
                central[30..32].copy_from_slice(&20_u16.to_le_bytes());
                let wide = [&sizes[..], &[0; 4]].concat();
                central.extend([&1_u16.to_le_bytes()[..], &16_u16.to_le_bytes(), &wide, &wide].concat());
            }
        });
        assert_eq!(read_bytes(&zip).unwrap()["a/y"].len, 6);
    }

    #[test]
    fn reads_the_64_bit_end_record() {
        let zip = zip_with(&TWO, |_, _| {});
        let (body, end) = zip.split_at(zip.len() - END_LEN as usize);
        let wide = |field: &[u8]| u64::from(u32::from_le_bytes(field.try_into().unwrap())).to_le_bytes();
        let (table_len, table_at) = (wide(&end[12..16]), wide(&end[16..20]));
        let end64 = [b"PK\x06\x06", &[0; 28][..], &2_u64.to_le_bytes(), &table_len, &table_at].concat();
        let locator = [b"PK\x06\x07", &[0; 4][..], &(body.len() as u64).to_le_bytes(), &[0; 4]].concat();
        let end = [b"PK\x05\x06", &[0xff; 16][..], &[0; 2]].concat();
        assert_eq!(read_bytes(&[body, &end64, &locator, &end].concat()).unwrap(), read_bytes(&zip).unwrap());
        let damaged = read_bytes(&[body, &[0; 56], &locator, &end].concat()).unwrap_err();
        assert!(damaged.to_string().contains("64-bit end record"), "{damaged}");
    }

    #[test]
    fn refuses_damage() {
        let put = |at: usize, bytes: &'static [u8]| {
            zip_with(&TWO, move |_, central| central[at..at + bytes.len()].copy_from_slice(bytes))
        };
        let whole = zip_with(&TWO, |_, _| {});
        for (bytes, expected) in [
            (Vec::new(), "cut off"),
            (whole[..whole.len() - 1].to_vec(), "cut off"),
            (whole[40..].to_vec(), "ends early"),
            (put(0, b"XX"), "damaged table of contents"),
            (put(8, &[1]), "is encrypted"),
            (put(10, &[8]), "is compressed"),
            (put(24, &[0xff]), "is compressed"),
            (put(20, &[0xff, 0xff, 0, 0, 0xff, 0xff]), "beyond the end"),
            (put(24, &[0xff; 4]), "damaged table of contents"),
            (put(42, &[1]), "has no header"),
            (put(42, &[0xf0; 4]), "ends early"),
            (put(46, b"../"), "plain relative path"),
            (put(46, b"/"), "plain relative path"),
            (put(46, b"\xff"), "plain relative path"),
            (put(48, b"z"), "appears twice"),
        ] {
            let error = read_bytes(&bytes).unwrap_err().to_string();
            assert!(error.contains("m.bin") && error.contains(expected), "{expected}: {error}");
        }
        let overlapping = zip_with(&[("a", &[0; 100]), ("b", &[])], |index, central| {
            if index == 1 {
                central[20] = 100;
                central[24] = 100;
                central[42..46].fill(0);
            }
        });
        let mut many = overlapping.clone();
        assert!(read_bytes(&overlapping).is_ok(), "two entries of 100 bytes fit into the file");
        let at = many.len() - 12;
        many[at] = 0xff;
        assert!(read_bytes(&many).is_err(), "more entries than the table holds");
    }
}
