//! Texts in NumPy's arrays of objects, which are pickled: the one kind of them that a tensor holds.
//!
//! Nothing of a pickle is run. Its operations (Python's `pickletools`, protocols 2 to 5) are walked as far as it takes to see which
//! texts are the elements of its lists; an array's only list is that of its elements.

use anyhow::{Context, Result, bail};
use std::rc::Rc;

/// Texts together at most: a pickle of few bytes may name one text again and again.
const TEXT_BYTES_MAX: usize = 1 << 30;

/// What an operation leaves on the stack, as far as it matters.
#[derive(Clone)]
enum Item {
    Text(Rc<str>),
    Mark,
    Other,
}

struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(count).context("a pickle that ends too early")?;
        self.rest = rest;
        Ok(taken)
    }

    /// An unsigned number of `bytes` bytes.
    fn number(&mut self, bytes: usize) -> Result<usize> {
        let value = self.take(bytes)?.iter().rev().fold(0u64, |n, &b| n << 8 | u64::from(b));
        usize::try_from(value).context("a pickle of too large a number")
    }

    /// What has its length, of `bytes` bytes, before it.
    fn counted(&mut self, bytes: usize) -> Result<&'a [u8]> {
        let length = self.number(bytes)?;
        self.take(length)
    }

    fn text(&mut self, bytes: usize) -> Result<Item> {
        let text = std::str::from_utf8(self.counted(bytes)?).context("a pickled text that is not UTF-8")?;
        Ok(Item::Text(text.into()))
    }

    fn line(&mut self) -> Result<()> {
        let end = self.rest.iter().position(|&b| b == b'\n').context("a pickle that ends too early")?;
        self.take(end + 1).map(|_| ())
    }
}

/// The `count` texts of a pickled array.
pub fn texts(pickle: &[u8], count: usize) -> Result<Vec<String>> {
    let mut reader = Reader { rest: pickle };
    let mut stack: Vec<Item> = Vec::new();
    let mut memo: Vec<Item> = Vec::new();
    let (mut found, mut size) = (Vec::new(), 0usize);
    let mut element = |item: Option<Item>| -> Result<()> {
        let Some(Item::Text(text)) = item else { bail!("an array of objects that are not all texts") };
        size += text.len();
        if found.len() == count || size > TEXT_BYTES_MAX {
            bail!("more pickled texts than expected ({count}, of {TEXT_BYTES_MAX} bytes at most)");
        }
        found.push(text.to_string());
        Ok(())
    };
    loop {
        let pop = |stack: &mut Vec<Item>, count: usize| stack.truncate(stack.len().saturating_sub(count));
        let marked = |stack: &mut Vec<Item>| -> Result<Vec<Item>> {
            let mark = stack.iter().rposition(|item| matches!(item, Item::Mark)).context("a pickle out of order")?;
            let items = stack.split_off(mark + 1);
            stack.pop();
            Ok(items)
        };
        let pushed = match reader.number(1)? as u8 {
            b'.' => break,
            // The protocol, and the length of a frame.
            0x80 => reader.take(1).map(|_| None)?,
            0x95 => reader.take(8).map(|_| None)?,
            b'(' => Some(Item::Mark),
            b'X' => Some(reader.text(4)?),
            0x8c => Some(reader.text(1)?),
            0x8d => Some(reader.text(8)?),
            // Numbers, bytes, truths, nothing, and what is empty.
            b'K' => reader.take(1).map(|_| Some(Item::Other))?,
            b'M' => reader.take(2).map(|_| Some(Item::Other))?,
            b'J' => reader.take(4).map(|_| Some(Item::Other))?,
            b'G' => reader.take(8).map(|_| Some(Item::Other))?,
            0x8a | b'C' | b'U' => reader.counted(1).map(|_| Some(Item::Other))?,
            b'B' | b'T' => reader.counted(4).map(|_| Some(Item::Other))?,
            b'N' | b')' | b']' | b'}' | 0x88 | 0x89 => Some(Item::Other),
            // A class by its name; an object of what is on the stack, and its state.
            b'c' => {
                reader.line()?;
                reader.line()?;
                Some(Item::Other)
            }
            0x93 | b'R' | b'b' | 0x86 => {
                pop(&mut stack, 2);
                Some(Item::Other)
            }
            0x85 => {
                pop(&mut stack, 1);
                Some(Item::Other)
            }
            0x87 => {
                pop(&mut stack, 3);
                Some(Item::Other)
            }
            b't' => {
                marked(&mut stack)?;
                Some(Item::Other)
            }
            // One more element of the list below, or all from the mark on.
            b'a' => {
                element(stack.pop())?;
                None
            }
            b'e' => {
                marked(&mut stack)?.into_iter().try_for_each(|item| element(Some(item)))?;
                None
            }
            // What is kept for later, in order or by number: writers number in order too.
            operation @ (0x94 | b'q' | b'r') => {
                let number = match operation {
                    b'q' => reader.number(1)?,
                    b'r' => reader.number(4)?,
                    _ => memo.len(),
                };
                let top = stack.last().context("a pickle out of order")?.clone();
                if number > memo.len() {
                    bail!("a pickle out of order");
                }
                memo.truncate(number);
                memo.push(top);
                None
            }
            operation @ (b'h' | b'j') => {
                let number = reader.number(if operation == b'h' { 1 } else { 4 })?;
                Some(memo.get(number).context("a pickle out of order")?.clone())
            }
            other => bail!("an array of objects that are not all texts (operation {other:#x})"),
        };
        stack.extend(pushed);
    }
    if found.len() != count {
        bail!("{} pickled texts, expected {count}", found.len());
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `pickle.dumps(numpy.array(["a", "bc", "a"], object), protocol)` of NumPy 2, with one `"a"` for both.
    fn pickled(protocol: u8) -> Vec<u8> {
        let text = |text: &str| match protocol {
            4 => [&[0x8c, text.len() as u8], text.as_bytes()].concat(),
            _ => [&[b'X', text.len() as u8, 0, 0, 0], text.as_bytes()].concat(),
        };
        let mut bytes = vec![0x80, protocol];
        bytes.extend(b"cnumpy._core.multiarray\n_reconstruct\nq\x00cnumpy\nndarray\nq\x01K\x00\x85q\x02C\x01bq\x03\x87q\x04Rq\x05");
        bytes.extend(b"(K\x01K\x03\x85q\x06cnumpy\ndtype\nq\x07");
        bytes.extend(text("O8"));
        bytes.extend(b"q\x08\x89\x88\x87q\x09Rq\x0a(K\x03");
        bytes.extend(text("|"));
        bytes.extend(b"q\x0bNNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK?tq\x0cb\x89]q\x0d(");
        bytes.extend(text("a"));
        bytes.extend(b"q\x0e");
        bytes.extend(text("bc"));
        bytes.extend(b"q\x0fh\x0eetq\x10b.");
        bytes
    }

    #[test]
    fn texts_of_arrays() {
        for protocol in [3, 4] {
            assert_eq!(texts(&pickled(protocol), 3).unwrap(), ["a", "bc", "a"]);
        }
    }

    #[test]
    fn what_is_not_texts_is_refused() {
        let fails = |pickle: &[u8], count: usize, why: &str| {
            let error = texts(pickle, count).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        };
        fails(&pickled(4), 2, "more pickled texts than expected (2");
        fails(&pickled(4), 4, "3 pickled texts, expected 4");
        fails(b"\x80\x04](K\x01K\x02e.", 2, "not all texts");
        fails(b"\x80\x04]Na.", 1, "not all texts");
        fails(b"\x80\x04I1\n.", 1, "operation 0x49");
        fails(b"\x80\x04\x8c\xff", 1, "ends too early");
        fails(b"\x80\x04e", 1, "out of order");
        fails(b"\x80\x04q\x00", 1, "out of order");
        fails(b"\x80\x04h\x07", 1, "out of order");
        let whole = pickled(4);
        for length in 0..whole.len() {
            assert!(texts(&whole[..length], 3).is_err(), "{length} bytes of {}", whole.len());
        }
    }
}
