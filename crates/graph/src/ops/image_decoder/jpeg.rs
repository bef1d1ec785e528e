//! JPEG with Huffman codes, sequential and progressive, of eight bits (ITU-T T.81).
//!
//! ONNX defines the interpolation of chroma as libjpeg-turbo does it, and its cases compare every bit; so the inverse transform is that
//! library's accurate one in integers (Loeffler, Ligtenberg and Moschytz, 1989), its interpolation rounds up and down in turn, and colours are
//! converted with sixteen bits after the point. Arithmetic codes, lossless files, and four components are not read.

use crate::OpError;

/// Pixels, row-major, one or three bytes each.
pub(super) struct Jpeg {
    pub width: usize,
    pub height: usize,
    pub channels: usize,
    pub pixels: Vec<u8>,
}

/// Scans that a file may have: each costs a walk over all blocks, however few bytes it takes.
const SCANS_MAX: usize = 500;

/// Position in a block, row-major, of a coefficient in the order of the file.
const ZIGZAG: [usize; 64] = [
    0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13, 6, 7, 14, 21,
    28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54,
    47, 55, 62, 63,
];

fn corrupt<T>(message: &str) -> Result<T, OpError> {
    Err(OpError::input(format!("a JPEG file: {message}")))
}

fn unsupported<T>(message: &str) -> Result<T, OpError> {
    Err(OpError::unsupported(format!("a JPEG file with {message}")))
}

pub(super) fn decode(bytes: &[u8], pixels_max: usize) -> Result<Jpeg, OpError> {
    let mut decoder = Decoder { bytes, at: 2, pixels_max, ..Decoder::default() };
    decoder.segments()?;
    decoder.picture()
}

/// Huffman codes by length.
#[derive(Clone)]
struct Codes {
    /// For each length the code after its last, and what added to a code gives the index of its symbol.
    lengths: [(i32, i32); 17],
    symbols: Vec<u8>,
}

impl Codes {
    fn new(counts: &[u8], symbols: &[u8]) -> Codes {
        let mut lengths = [(0, 0); 17];
        let (mut code, mut index) = (0i32, 0i32);
        for (length, &count) in counts.iter().enumerate() {
            let first = code;
            code += i32::from(count);
            lengths[length + 1] = (code, index - first);
            index += i32::from(count);
            code <<= 1;
        }
        Codes { lengths, symbols: symbols.to_vec() }
    }
}

#[derive(Default)]
struct Component {
    id: u8,
    /// Sampling factors.
    across: usize,
    down: usize,
    quantization: usize,
    /// Samples that the picture has of it.
    width: usize,
    height: usize,
    /// Blocks, those that fill up the last units included.
    blocks_across: usize,
    blocks_down: usize,
    /// 64 for each block, in the order of the file.
    coefficients: Vec<i16>,
    prediction: i32,
}

#[derive(Default)]
struct Decoder<'a> {
    bytes: &'a [u8],
    at: usize,
    pixels_max: usize,
    quantization: [Option<[u16; 64]>; 4],
    /// Of the first coefficients of blocks, and of the others.
    codes: [[Option<Codes>; 4]; 2],
    restart_interval: usize,
    progressive: bool,
    width: usize,
    height: usize,
    components: Vec<Component>,
    jfif: bool,
    adobe_transform: Option<u8>,
    scans: usize,
}

/// What a scan says of every block.
struct Scan {
    first: usize,
    last: usize,
    /// The bit from which coefficients are refined, and the one to which.
    high: u8,
    low: u8,
}

impl<'a> Decoder<'a> {
    fn byte(&mut self) -> Result<u8, OpError> {
        let Some(&byte) = self.bytes.get(self.at) else { return corrupt("ends too early") };
        self.at += 1;
        Ok(byte)
    }

    /// The content of the segment that starts here.
    fn segment(&mut self) -> Result<&'a [u8], OpError> {
        let length = usize::from(self.byte()?) << 8 | usize::from(self.byte()?);
        let bytes = self.bytes;
        let Some(segment) = length.checked_sub(2).and_then(|length| bytes.get(self.at..self.at + length)) else {
            return corrupt("a segment ends after the file");
        };
        self.at += segment.len();
        Ok(segment)
    }

    fn segments(&mut self) -> Result<(), OpError> {
        loop {
            // Bytes between segments mean nothing.
            while self.byte()? != 0xff {}
            let mut marker = self.byte()?;
            while marker == 0xff {
                marker = self.byte()?;
            }
            match marker {
                0xd9 => return if self.scans > 0 { Ok(()) } else { corrupt("has no picture") },
                0x00 | 0x01 | 0xd0..=0xd8 => {}
                0xc0..=0xc2 => {
                    let segment = self.segment()?;
                    self.frame(marker, segment)?;
                }
                0xc4 => {
                    let segment = self.segment()?;
                    self.huffman(segment)?;
                }
                0xc8..=0xcf => return unsupported("arithmetic codes"),
                0xc3 | 0xc5..=0xc7 => return unsupported("a lossless or hierarchical picture"),
                0xda => {
                    let segment = self.segment()?;
                    self.scan(segment)?;
                }
                0xdb => {
                    let segment = self.segment()?;
                    self.quantization(segment)?;
                }
                0xdd => match *self.segment()? {
                    [high, low] => self.restart_interval = usize::from(high) << 8 | usize::from(low),
                    _ => return corrupt("a restart interval that is no number"),
                },
                _ => {
                    let segment = self.segment()?;
                    match marker {
                        0xe0 if segment.starts_with(b"JFIF\0") => self.jfif = true,
                        0xee if segment.starts_with(b"Adobe") => self.adobe_transform = segment.get(11).copied(),
                        _ => {}
                    }
                }
            }
        }
    }

    fn quantization(&mut self, mut segment: &[u8]) -> Result<(), OpError> {
        while let Some((&kind, rest)) = segment.split_first() {
            let size = if kind >> 4 == 0 { 64 } else { 128 };
            let (Some(values), true) = (rest.get(..size), kind & 15 < 4) else {
                return corrupt("quantization that ends early");
            };
            let mut table = [0; 64];
            for (at, value) in table.iter_mut().enumerate() {
                *value = match size {
                    64 => u16::from(values[at]),
                    _ => u16::from_be_bytes([values[2 * at], values[2 * at + 1]]),
                };
            }
            self.quantization[usize::from(kind & 15)] = Some(table);
            segment = &rest[size..];
        }
        Ok(())
    }

    fn huffman(&mut self, mut segment: &[u8]) -> Result<(), OpError> {
        while let Some((&kind, rest)) = segment.split_first() {
            let Some((counts, rest)) = rest.split_at_checked(16) else { return corrupt("codes that end early") };
            let count = counts.iter().map(|&count| usize::from(count)).sum();
            let (Some((symbols, rest)), true) = (rest.split_at_checked(count), kind >> 4 < 2 && kind & 15 < 4) else {
                return corrupt("codes that end early");
            };
            self.codes[usize::from(kind >> 4)][usize::from(kind & 15)] = Some(Codes::new(counts, symbols));
            segment = rest;
        }
        Ok(())
    }

    fn frame(&mut self, marker: u8, segment: &[u8]) -> Result<(), OpError> {
        if !self.components.is_empty() {
            return corrupt("has two pictures");
        }
        let &[precision, h1, h0, w1, w0, count, ref rest @ ..] = segment else {
            return corrupt("its frame ends early");
        };
        if precision != 8 {
            return unsupported("more or less than eight bits");
        }
        self.progressive = marker == 0xc2;
        self.height = usize::from(u16::from_be_bytes([h1, h0]));
        self.width = usize::from(u16::from_be_bytes([w1, w0]));
        if !matches!(count, 1 | 3) {
            return unsupported("other than one or three components");
        }
        if self.width == 0 || self.height == 0 || rest.len() != 3 * usize::from(count) {
            return corrupt("its frame holds nothing");
        }
        if self.width * self.height > self.pixels_max {
            let (width, height, limit) = (self.width, self.height, self.pixels_max);
            return Err(OpError::Resource(format!("a picture of {width} × {height} pixels, above {limit}")));
        }
        for of in rest.chunks_exact(3) {
            let (across, down) = (usize::from(of[1] >> 4), usize::from(of[1] & 15));
            if !(1..=4).contains(&across) || !(1..=4).contains(&down) || of[2] > 3 {
                return corrupt("a component's sampling");
            }
            let quantization = usize::from(of[2]);
            self.components.push(Component { id: of[0], across, down, quantization, ..Component::default() });
        }
        let (across, down) = self.sampling();
        let units = (self.width.div_ceil(8 * across), self.height.div_ceil(8 * down));
        for component in &mut self.components {
            if across % component.across != 0 || down % component.down != 0 {
                return unsupported("sampling that does not divide");
            }
            component.width = (self.width * component.across).div_ceil(across);
            component.height = (self.height * component.down).div_ceil(down);
            component.blocks_across = units.0 * component.across;
            component.blocks_down = units.1 * component.down;
            component.coefficients = vec![0; component.blocks_across * component.blocks_down * 64];
        }
        Ok(())
    }

    /// Largest sampling factors.
    fn sampling(&self) -> (usize, usize) {
        let largest = |of: fn(&Component) -> usize| self.components.iter().map(of).max().unwrap_or(1);
        (largest(|c| c.across), largest(|c| c.down))
    }

    fn scan(&mut self, segment: &[u8]) -> Result<(), OpError> {
        self.scans += 1;
        if self.scans > SCANS_MAX {
            return corrupt("has too many scans");
        }
        let count = usize::from(segment.first().copied().unwrap_or(0));
        let Some(&[first, last, approximation]) = segment.get(1 + 2 * count..) else {
            return corrupt("a scan's header");
        };
        let scan = Scan { first: first.into(), last: last.into(), high: approximation >> 4, low: approximation & 15 };
        let spectral = match self.progressive {
            true if scan.first == 0 => scan.last == 0,
            true => scan.first <= scan.last && scan.last < 64 && count == 1,
            false => scan.first == 0 && scan.last == 63 && scan.high == 0 && scan.low == 0,
        };
        if !spectral || scan.low > 13 || (scan.high != 0 && scan.high != scan.low + 1) {
            return corrupt("a scan of no coefficients");
        }
        let mut chosen: Vec<(usize, Option<Codes>, Option<Codes>)> = Vec::with_capacity(count);
        for of in segment[1..1 + 2 * count].chunks_exact(2) {
            let component = self.components.iter().position(|component| component.id == of[0]);
            let Some(component) = component.filter(|at| chosen.iter().all(|&(other, ..)| other != *at)) else {
                return corrupt("a scan of a component that is not there");
            };
            let table = |class: usize, index: u8| self.codes[class].get(usize::from(index)).cloned().flatten();
            chosen.push((component, table(0, of[1] >> 4), table(1, of[1] & 15)));
        }
        let mut bits = Bits { bytes: self.bytes, at: self.at, buffer: 0, count: 0 };
        let (across, down) = self.sampling();
        // A scan of one component goes through its own blocks, and leaves out those that only fill up units.
        let alone = chosen.len() == 1;
        let (columns, rows) = match chosen.as_slice() {
            [] => return corrupt("a scan of nothing"),
            [(only, ..)] => {
                let component = &self.components[*only];
                (component.width.div_ceil(8), component.height.div_ceil(8))
            }
            _ => (self.width.div_ceil(8 * across), self.height.div_ceil(8 * down)),
        };
        let mut run = 0u32;
        self.components.iter_mut().for_each(|component| component.prediction = 0);
        for unit in 0..columns * rows {
            if self.restart_interval > 0 && unit > 0 && unit % self.restart_interval == 0 {
                bits.restart()?;
                run = 0;
                self.components.iter_mut().for_each(|component| component.prediction = 0);
            }
            for (component, first, others) in &chosen {
                let component = &mut self.components[*component];
                let blocks = if alone { (1, 1) } else { (component.across, component.down) };
                for (y, x) in (0..blocks.1).flat_map(|y| (0..blocks.0).map(move |x| (y, x))) {
                    let (row, column) = (unit / columns * blocks.1 + y, unit % columns * blocks.0 + x);
                    let at = (row * component.blocks_across + column) * 64;
                    let block = &mut component.coefficients[at..at + 64];
                    let prediction = &mut component.prediction;
                    match (self.progressive, scan.first, scan.high) {
                        (false, ..) => sequential(&mut bits, block, prediction, (first.as_ref(), others.as_ref()))?,
                        (true, 0, 0) => block[0] = bits.first(first.as_ref(), prediction, scan.low)?,
                        (true, 0, _) => block[0] |= (bits.take(1)? << scan.low) as i16,
                        (true, _, 0) => progressive(&mut bits, block, &scan, &mut run, others.as_ref())?,
                        (true, ..) => refine(&mut bits, block, &scan, &mut run, others.as_ref())?,
                    }
                }
            }
        }
        self.at = bits.at;
        Ok(())
    }

    fn picture(&self) -> Result<Jpeg, OpError> {
        let (across, down) = self.sampling();
        let planes = self.components.iter().map(|component| {
            let Some(table) = &self.quantization[component.quantization] else {
                return corrupt("quantization is missing");
            };
            let plane = component.samples(table);
            let stride = component.blocks_across * 8;
            let plane = Plane { samples: plane, stride, width: component.width, height: component.height };
            Ok(plane.enlarge(across / component.across, down / component.down, self.width, self.height))
        });
        let planes = planes.collect::<Result<Vec<Vec<u8>>, OpError>>()?;
        let (width, height, channels) = (self.width, self.height, planes.len());
        let pixels = match planes.as_slice() {
            [luma] => luma.clone(),
            [a, b, c] => {
                let ids: Vec<u8> = self.components.iter().map(|component| component.id).collect();
                let coloured = match self.adobe_transform {
                    _ if self.jfif => true,
                    Some(transform) => transform != 0,
                    None => ids != *b"RGB",
                };
                let pixels = a.iter().zip(b).zip(c).map(|((&a, &b), &c)| [a, b, c]);
                if coloured { pixels.flat_map(rgb).collect() } else { pixels.flatten().collect() }
            }
            _ => return corrupt("has no picture"),
        };
        Ok(Jpeg { width, height, channels, pixels })
    }
}

/// Luma and chroma as red, green and blue.
fn rgb([y, cb, cr]: [u8; 3]) -> [u8; 3] {
    let (y, cb, cr) = (i32::from(y), i32::from(cb) - 128, i32::from(cr) - 128);
    let half = 1 << 15;
    // 1.402, 0.34414, 0.71414 and 1.772 (ITU-R BT.601).
    let red = y + ((91881 * cr + half) >> 16);
    let green = y + ((-22554 * cb - 46802 * cr + half) >> 16);
    let blue = y + ((116130 * cb + half) >> 16);
    [red, green, blue].map(|value| value.clamp(0, 255) as u8)
}

struct Bits<'a> {
    bytes: &'a [u8],
    at: usize,
    buffer: u32,
    count: u32,
}

impl Bits<'_> {
    fn take(&mut self, count: u32) -> Result<i32, OpError> {
        while self.count < count {
            match (self.bytes.get(self.at), self.bytes.get(self.at + 1)) {
                (Some(0xff), Some(0)) => {
                    self.buffer = self.buffer << 8 | 0xff;
                    self.at += 2;
                }
                (Some(0xff), _) | (None, _) => return corrupt("a scan ends early"),
                (Some(&byte), _) => {
                    self.buffer = self.buffer << 8 | u32::from(byte);
                    self.at += 1;
                }
            }
            self.count += 8;
        }
        self.count -= count;
        Ok((self.buffer >> self.count & ((1 << count) - 1)) as i32)
    }

    /// Over the marker between two intervals.
    fn restart(&mut self) -> Result<(), OpError> {
        (self.buffer, self.count) = (0, 0);
        match (self.bytes.get(self.at), self.bytes.get(self.at + 1)) {
            (Some(0xff), Some(0xd0..=0xd7)) => self.at += 2,
            _ => return corrupt("a restart is missing"),
        }
        Ok(())
    }

    fn symbol(&mut self, codes: Option<&Codes>) -> Result<u8, OpError> {
        let Some(codes) = codes else { return corrupt("a scan whose codes are missing") };
        let mut code = 0;
        for (end, to_index) in &codes.lengths[1..] {
            code = code << 1 | self.take(1)?;
            if code < *end {
                let symbol = usize::try_from(code + to_index).ok().and_then(|index| codes.symbols.get(index));
                return symbol.copied().map_or_else(|| corrupt("a code without a symbol"), Ok);
            }
        }
        corrupt("a code without a symbol")
    }

    /// A number of so many bits, negative where the first is 0.
    fn number(&mut self, bits: u32) -> Result<i32, OpError> {
        if bits == 0 {
            return Ok(0);
        }
        let value = self.take(bits)?;
        Ok(if value < 1 << (bits - 1) { value - (1 << bits) + 1 } else { value })
    }

    /// The first coefficient of a block, a difference from the one before.
    fn first(&mut self, codes: Option<&Codes>, prediction: &mut i32, low: u8) -> Result<i16, OpError> {
        let bits = self.symbol(codes)?;
        if bits > 15 {
            return corrupt("a coefficient of too many bits");
        }
        *prediction = prediction.wrapping_add(self.number(bits.into())?);
        Ok((*prediction << low) as i16)
    }
}

fn sequential(
    bits: &mut Bits<'_>,
    block: &mut [i16],
    prediction: &mut i32,
    (first, others): (Option<&Codes>, Option<&Codes>),
) -> Result<(), OpError> {
    block[0] = bits.first(first, prediction, 0)?;
    let mut at = 1;
    while at < 64 {
        let symbol = bits.symbol(others)?;
        match (symbol >> 4, symbol & 15) {
            (15, 0) => at += 16,
            (_, 0) => break,
            (zeros, size) => {
                at += usize::from(zeros);
                let value = bits.number(size.into())?;
                let Some(coefficient) = block.get_mut(at) else {
                    return corrupt("a block has more than 64 coefficients");
                };
                *coefficient = value as i16;
                at += 1;
            }
        }
    }
    Ok(())
}

/// Blocks after which the band is zero: their count less this one.
fn run_of_blocks(bits: &mut Bits<'_>, size: u8) -> Result<u32, OpError> {
    Ok((1 << size) + bits.take(size.into())? as u32)
}

/// The high bits of a band of a block.
fn progressive(
    bits: &mut Bits<'_>,
    block: &mut [i16],
    scan: &Scan,
    run: &mut u32,
    codes: Option<&Codes>,
) -> Result<(), OpError> {
    if *run > 0 {
        *run -= 1;
        return Ok(());
    }
    let mut at = scan.first;
    while at <= scan.last {
        let symbol = bits.symbol(codes)?;
        match (symbol >> 4, symbol & 15) {
            (15, 0) => at += 16,
            (size, 0) => {
                *run = run_of_blocks(bits, size)? - 1;
                break;
            }
            (zeros, size) => {
                at += usize::from(zeros);
                let value = bits.number(size.into())?;
                if at > scan.last {
                    return corrupt("a band has more coefficients than it may");
                }
                block[at] = (value << scan.low) as i16;
                at += 1;
            }
        }
    }
    Ok(())
}

/// One more bit of a band of a block, and coefficients that this bit makes other than zero.
fn refine(
    bits: &mut Bits<'_>,
    block: &mut [i16],
    scan: &Scan,
    run: &mut u32,
    codes: Option<&Codes>,
) -> Result<(), OpError> {
    let bit = 1i16 << scan.low;
    let correct = |bits: &mut Bits<'_>, coefficient: &mut i16| -> Result<(), OpError> {
        if bits.take(1)? == 1 && *coefficient & bit == 0 {
            *coefficient = coefficient.wrapping_add(if *coefficient >= 0 { bit } else { -bit });
        }
        Ok(())
    };
    let mut at = scan.first;
    if *run == 0 {
        while at <= scan.last {
            let symbol = bits.symbol(codes)?;
            let (mut zeros, size) = (symbol >> 4, symbol & 15);
            let new = match (zeros, size) {
                (15, 0) => 0,
                (_, 0) => {
                    *run = run_of_blocks(bits, zeros)?;
                    break;
                }
                (_, 1) => {
                    if bits.take(1)? == 1 {
                        bit
                    } else {
                        -bit
                    }
                }
                _ => return corrupt("a refinement of more than a bit"),
            };
            // Over so many zeros, and all that is there already.
            while at <= scan.last {
                if block[at] != 0 {
                    correct(bits, &mut block[at])?;
                } else if zeros == 0 {
                    block[at] = new;
                    at += 1;
                    break;
                } else {
                    zeros -= 1;
                }
                at += 1;
            }
        }
    }
    if *run > 0 {
        for coefficient in block[at..=scan.last].iter_mut().filter(|coefficient| **coefficient != 0) {
            correct(bits, coefficient)?;
        }
        *run -= 1;
    }
    Ok(())
}

impl Component {
    /// Samples row-major, `blocks_across · 8` to a row.
    fn samples(&self, quantization: &[u16; 64]) -> Vec<u8> {
        let stride = self.blocks_across * 8;
        let mut samples = vec![0; stride * self.blocks_down * 8];
        for (index, block) in self.coefficients.chunks_exact(64).enumerate() {
            let mut values = [0i32; 64];
            for (at, (&coefficient, &step)) in block.iter().zip(quantization).enumerate() {
                values[ZIGZAG[at]] = i32::from(coefficient) * i32::from(step);
            }
            let corner = index / self.blocks_across * 8 * stride + index % self.blocks_across * 8;
            for (row, values) in inverse_transform(&mut values).chunks_exact(8).enumerate() {
                let target = &mut samples[corner + row * stride..][..8];
                target.iter_mut().zip(values).for_each(|(sample, value)| *sample = (value + 128).clamp(0, 255) as u8);
            }
        }
        samples
    }
}

/// The inverse cosine transform of a block: columns, then rows.
fn inverse_transform(block: &mut [i32; 64]) -> &[i32; 64] {
    for column in 0..8 {
        let values = line(std::array::from_fn(|row| block[row * 8 + column]), 11);
        values.iter().enumerate().for_each(|(row, value)| block[row * 8 + column] = *value);
    }
    for row in block.chunks_exact_mut(8) {
        let values = line(std::array::from_fn(|column| row[column]), 18);
        row.copy_from_slice(&values);
    }
    block
}

/// Eight values transformed with factors of thirteen bits after the point, and rounded to `shift` bits fewer. Values beyond what
/// a valid file has wrap.
fn line(x: [i32; 8], shift: u32) -> [i32; 8] {
    let x = x.map(std::num::Wrapping);
    let [c0, c1, c2, c3, c4, c5, c6, c7] = x;
    let times = |value: std::num::Wrapping<i32>, factor: i32| value * std::num::Wrapping(factor);
    let z = times(c2 + c6, 4433);
    let (even2, even3) = (z - times(c6, 15137), z + times(c2, 6270));
    let (even0, even1) = ((c0 + c4) << 13, (c0 - c4) << 13);
    let even = [even0 + even3, even1 + even2, even1 - even2, even0 - even3];
    let z5 = times(c7 + c3 + c5 + c1, 9633);
    let (z1, z2) = (times(c7 + c1, -7373), times(c5 + c3, -20995));
    let (z3, z4) = (times(c7 + c3, -16069) + z5, times(c5 + c1, -3196) + z5);
    let odd =
        [times(c1, 12299) + z1 + z4, times(c3, 25172) + z2 + z3, times(c5, 16819) + z2 + z4, times(c7, 2446) + z1 + z3];
    let half = std::num::Wrapping(1 << (shift - 1));
    std::array::from_fn(|at| {
        let sum = if at < 4 { even[at] + odd[at] } else { even[7 - at] - odd[7 - at] };
        (sum + half).0 >> shift
    })
}

/// The samples of a component.
struct Plane {
    samples: Vec<u8>,
    stride: usize,
    width: usize,
    height: usize,
}

impl Plane {
    fn row(&self, row: usize) -> &[u8] {
        &self.samples[row.min(self.height - 1) * self.stride..][..self.width]
    }

    /// `width × height` samples: twice as many are interpolated, other factors repeat.
    fn enlarge(&self, across: usize, down: usize, width: usize, height: usize) -> Vec<u8> {
        let mut pixels = Vec::with_capacity(width * height);
        let interpolated = self.width > 2;
        for y in 0..height {
            let row = self.row(y / down);
            let beside = if y % 2 == 0 { self.row((y / 2).saturating_sub(1)) } else { self.row(y / 2 + 1) };
            match (across, down) {
                (1, 1) => pixels.extend_from_slice(&row[..width]),
                (2, 1) if interpolated => {
                    let sums: Vec<u32> = row.iter().map(|&x| x.into()).collect();
                    pixels.extend(doubled(&sums, 1, 2, 2).take(width));
                }
                (1, 2) => {
                    let bias = if y % 2 == 0 { 1 } else { 2 };
                    let sum = |(&near, &far): (&u8, &u8)| ((u32::from(near) * 3 + u32::from(far) + bias) >> 2) as u8;
                    pixels.extend(row.iter().zip(beside).map(sum).take(width));
                }
                (2, 2) if interpolated => {
                    let sums: Vec<u32> =
                        row.iter().zip(beside).map(|(&n, &f)| u32::from(n) * 3 + u32::from(f)).collect();
                    pixels.extend(doubled(&sums, 8, 7, 4).take(width));
                }
                _ => pixels.extend((0..width).map(|x| row[x / across])),
            }
        }
        pixels
    }
}

/// Between every two neighbours two values, at a quarter and three quarters; those to the left round by `left`, to the right by `right`. The
/// outermost have no neighbour but themselves.
fn doubled(x: &[u32], left: u32, right: u32, shift: u32) -> impl Iterator<Item = u8> + '_ {
    (0..x.len()).flat_map(move |i| {
        let (before, after) = (x[i.saturating_sub(1)], x[(i + 1).min(x.len() - 1)]);
        [((3 * x[i] + before + left) >> shift) as u8, ((3 * x[i] + after + right) >> shift) as u8]
    })
}
