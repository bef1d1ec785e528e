//! Protobuf messages as trees of numbered fields, without a schema.

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Message(pub Vec<(u32, Field)>);

#[derive(Clone, Debug, PartialEq)]
pub enum Field {
    Varint(u64),
    Eight([u8; 8]),
    Bytes(Vec<u8>),
    Four([u8; 4]),
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}

fn put_varint(mut value: u64, bytes: &mut Vec<u8>) {
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
}

impl Message {
    pub fn parse(mut bytes: &[u8]) -> Option<Message> {
        let mut fields = Vec::new();
        while !bytes.is_empty() {
            let key = varint(&mut bytes)?;
            let number = u32::try_from(key >> 3).ok().filter(|&number| number > 0 && number < 64)?;
            let mut take = |len: usize| {
                let (taken, rest) = bytes.split_at_checked(len)?;
                bytes = rest;
                Some(taken)
            };
            let field = match key & 7 {
                1 => Field::Eight(take(8)?.try_into().ok()?),
                5 => Field::Four(take(4)?.try_into().ok()?),
                0 => Field::Varint(varint(&mut bytes)?),
                2 => {
                    let len = usize::try_from(varint(&mut bytes)?).ok()?;
                    let (taken, rest) = bytes.split_at_checked(len)?;
                    bytes = rest;
                    Field::Bytes(taken.to_vec())
                }
                _ => return None,
            };
            fields.push((number, field));
        }
        Some(Message(fields))
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (number, field) in &self.0 {
            let key = |wire: u64| u64::from(*number) << 3 | wire;
            match field {
                Field::Varint(value) => {
                    put_varint(key(0), &mut bytes);
                    put_varint(*value, &mut bytes);
                }
                Field::Eight(value) => {
                    put_varint(key(1), &mut bytes);
                    bytes.extend(value);
                }
                Field::Bytes(value) => {
                    put_varint(key(2), &mut bytes);
                    put_varint(value.len() as u64, &mut bytes);
                    bytes.extend(value);
                }
                Field::Four(value) => {
                    put_varint(key(5), &mut bytes);
                    bytes.extend(value);
                }
            }
        }
        bytes
    }

    pub fn with(mut self, number: u32, field: impl Into<Field>) -> Message {
        self.0.push((number, field.into()));
        self
    }

    pub fn bytes(&self, number: u32) -> impl Iterator<Item = &[u8]> {
        self.0.iter().filter_map(move |(n, field)| match field {
            Field::Bytes(bytes) if *n == number => Some(bytes.as_slice()),
            _ => None,
        })
    }

    pub fn text(&self, number: u32) -> String {
        self.bytes(number).next().map(|bytes| String::from_utf8_lossy(bytes).into_owned()).unwrap_or_default()
    }

    pub fn messages(&self, number: u32) -> Vec<Message> {
        self.bytes(number).filter_map(Message::parse).collect()
    }

    pub fn remove(&mut self, number: u32) {
        self.0.retain(|(n, _)| *n != number);
    }
}

impl From<u64> for Field {
    fn from(value: u64) -> Field {
        Field::Varint(value)
    }
}

impl From<&str> for Field {
    fn from(value: &str) -> Field {
        Field::Bytes(value.as_bytes().to_vec())
    }
}

impl From<Vec<u8>> for Field {
    fn from(value: Vec<u8>) -> Field {
        Field::Bytes(value)
    }
}

impl From<Message> for Field {
    fn from(value: Message) -> Field {
        Field::Bytes(value.encode())
    }
}
