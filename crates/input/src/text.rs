//! Texts: a tokenizer.json, its tokens cut and padded.

use crate::{InputError, Text};
use tokenizers::{PaddingDirection, PaddingParams, PaddingStrategy, TruncationParams};

/// Largest tokenizer.json, in bytes.
const TOKENIZER_BYTES: usize = 256 << 20;

#[derive(Debug)]
pub(crate) struct Tokenizer {
    tokenizer: tokenizers::Tokenizer,
    name: String,
}

/// Tokens of several texts, `width` to each.
pub(crate) struct Tokens {
    pub width: usize,
    pub ids: Vec<u32>,
    pub mask: Vec<u32>,
    pub types: Vec<u32>,
}

impl Tokenizer {
    pub fn new(text: &Text, json: &[u8]) -> Result<Tokenizer, InputError> {
        if json.len() > TOKENIZER_BYTES {
            return Err(InputError::Tokenizer(format!("{} bytes, above {TOKENIZER_BYTES}", json.len())));
        }
        let failed = |error: tokenizers::Error| InputError::Tokenizer(error.to_string());
        let mut tokenizer = tokenizers::Tokenizer::from_bytes(json).map_err(failed)?;
        let truncation = TruncationParams { max_length: text.length, ..TruncationParams::default() };
        tokenizer.with_truncation(Some(truncation)).map_err(failed)?;
        let strategy = match text.pad_to_length {
            true => PaddingStrategy::Fixed(text.length),
            false => PaddingStrategy::BatchLongest,
        };
        let known = tokenizer.get_padding().cloned().unwrap_or_else(|| {
            let named = ["[PAD]", "<pad>", "<|endoftext|>", "</s>"];
            let found = named.iter().find_map(|name| Some((name.to_string(), tokenizer.token_to_id(name)?)));
            let (pad_token, pad_id) = found.unwrap_or(("[PAD]".to_string(), 0));
            PaddingParams { pad_token, pad_id, direction: PaddingDirection::Right, ..PaddingParams::default() }
        });
        tokenizer.with_padding(Some(PaddingParams { strategy, pad_to_multiple_of: None, ..known }));
        Ok(Tokenizer { tokenizer, name: text.name.clone() })
    }

    pub fn encode(&self, samples: &[&[u8]]) -> Result<Tokens, InputError> {
        let failed = |number: usize, message: String| InputError::Sample { name: self.name.clone(), number, message };
        let texts: Vec<&str> = samples
            .iter()
            .enumerate()
            .map(|(at, bytes)| std::str::from_utf8(bytes).map_err(|e| failed(at + 1, format!("not UTF-8: {e}"))))
            .collect::<Result<_, _>>()?;
        let count = texts.len();
        let encodings = self.tokenizer.encode_batch(texts, true).map_err(|e| failed(count, e.to_string()))?;
        let width = encodings.first().map_or(0, |encoding| encoding.len());
        let mut tokens = Tokens { width, ids: Vec::new(), mask: Vec::new(), types: Vec::new() };
        for (at, encoding) in encodings.iter().enumerate() {
            if encoding.len() != width {
                return Err(failed(at + 1, format!("{} tokens, the first has {width}", encoding.len())));
            }
            tokens.ids.extend(encoding.get_ids());
            tokens.mask.extend(encoding.get_attention_mask());
            tokens.types.extend(encoding.get_type_ids());
        }
        Ok(tokens)
    }
}
