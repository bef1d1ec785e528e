//! Pictures and texts against what is worked out by hand.
#![cfg(all(feature = "image", feature = "text"))]

use cutover_input::{Color, Filter, InputError, Layout, Picture, Preprocessing, Preprocessor, Raw, Resize, Text};
use cutover_tensor::{DType, Tensor, Value};
use image::{DynamicImage, ImageFormat, RgbImage};
use std::io::Cursor;

fn png(height: u32, width: u32, pixel: impl Fn(u32, u32) -> [u8; 3]) -> Vec<u8> {
    let image = RgbImage::from_fn(width, height, |x, y| image::Rgb(pixel(y, x)));
    let mut bytes = Vec::new();
    DynamicImage::ImageRgb8(image).write_to(&mut Cursor::new(&mut bytes), ImageFormat::Png).unwrap();
    bytes
}

fn of_picture(picture: Picture, dtype: DType) -> Result<Preprocessor, InputError> {
    let described = Preprocessing { pictures: vec![picture], texts: Vec::new() };
    Preprocessor::new(described, None, |name| (name == "x").then_some(dtype))
}

fn plain() -> Picture {
    Picture { input: "x".to_string(), ..Picture::default() }
}

fn apply(preprocessor: &Preprocessor, samples: &[&[u8]]) -> Result<Tensor, InputError> {
    Ok(preprocessor.apply(&Raw { name: "x", samples: samples.to_vec() })?.remove(0).1)
}

#[test]
fn channels_and_axes_go_where_they_are_described_to_go() {
    let picture = png(2, 3, |y, x| [(10 * y + x) as u8, 100, 200]);
    let scaled = Picture { scale: 1.0, ..plain() };
    for (color, layout, shape, expected) in [
        (Color::Rgb, Layout::Nchw, [1, 3, 2, 3], vec![0., 1., 2., 10., 11., 12.]),
        (Color::Bgr, Layout::Nchw, [1, 3, 2, 3], vec![200.; 6]),
        (Color::Rgb, Layout::Nhwc, [1, 2, 3, 3], vec![0., 100., 200., 1., 100., 200.]),
        (Color::Bgr, Layout::Nhwc, [1, 2, 3, 3], vec![200., 100., 0., 200., 100., 1.]),
    ] {
        let preprocessor = of_picture(Picture { color, layout, ..scaled.clone() }, DType::F32).unwrap();
        let tensor = apply(&preprocessor, &[&picture]).unwrap();
        assert_eq!(tensor.shape().dims(), shape);
        assert_eq!(tensor.to_vec::<f32>().unwrap()[..6], expected, "{color:?} {layout:?}");
    }
    let grey = of_picture(Picture { color: Color::Grey, ..scaled }, DType::U8).unwrap();
    let tensor = apply(&grey, &[&png(1, 1, |_, _| [255, 255, 255])]).unwrap();
    assert_eq!((tensor.shape().dims(), tensor.to_vec::<u8>().unwrap()), (&[1, 1, 1, 1][..], vec![255]));
}

#[test]
fn values_are_scaled_and_normalised_by_channel() {
    let picture = Picture { mean: vec![0.5, 0.25, 0.0], deviation: vec![0.5], ..plain() };
    let tensor = apply(&of_picture(picture, DType::F32).unwrap(), &[&png(1, 1, |_, _| [255, 0, 51])]).unwrap();
    let expected = [1.0, -0.5, 0.4];
    for (value, expected) in tensor.to_vec::<f32>().unwrap().iter().zip(expected) {
        assert!((value - expected).abs() < 1e-6, "{value}, expected {expected}");
    }
}

#[test]
fn the_shorter_side_is_resized_and_the_middle_cropped() {
    // A picture of 8 × 4 shrinks to 4 × 2; each of its pixels then covers four equal ones.
    let picture = png(8, 4, |y, x| [(y / 2 * 20 + x / 2) as u8; 3]);
    let described = Picture {
        resize: Some(Resize::Shorter(2)),
        filter: Filter::Nearest,
        crop: Some([2, 2]),
        scale: 1.0,
        ..plain()
    };
    let tensor = apply(&of_picture(described.clone(), DType::I32).unwrap(), &[&picture, &picture]).unwrap();
    assert_eq!(tensor.shape().dims(), [2, 3, 2, 2]);
    assert_eq!(tensor.to_vec::<i32>().unwrap()[..4], [20, 21, 40, 41]);
    // What is smaller than the crop lies in the middle of zeros.
    let described = Picture { resize: None, crop: Some([3, 4]), ..described };
    let tensor = apply(&of_picture(described, DType::I32).unwrap(), &[&png(1, 2, |_, _| [7; 3])]).unwrap();
    assert_eq!(tensor.to_vec::<i32>().unwrap()[..12], [0, 0, 0, 0, 0, 7, 7, 0, 0, 0, 0, 0]);
}

#[test]
fn a_picture_may_come_in_base64_as_json_carries_it() {
    use base64::{Engine as _, prelude::BASE64_STANDARD};
    let picture = png(1, 1, |_, _| [255, 0, 0]);
    let preprocessor = of_picture(plain(), DType::F32).unwrap();
    let given = vec![
        ("x".to_string(), Value::from(Tensor::from_strings([1], vec![BASE64_STANDARD.encode(picture)]).unwrap())),
        ("other".to_string(), Value::from(Tensor::scalar(3f32))),
    ];
    assert!(preprocessor.is_raw(&given) && !preprocessor.is_raw(&given[1..]));
    let prepared = preprocessor.prepare(&given).unwrap();
    assert_eq!(prepared[0].1.as_tensor().unwrap().to_vec::<f32>().unwrap(), [1.0, 0.0, 0.0]);
    assert_eq!(prepared[1], given[1]);
}

#[test]
fn bad_pictures_and_descriptions_are_named() {
    let preprocessor = of_picture(plain(), DType::F32).unwrap();
    let good = png(2, 2, |_, _| [0; 3]);
    let message = |result: Result<Tensor, InputError>| result.unwrap_err().to_string();
    assert!(message(apply(&preprocessor, &[&good, b"\x00\x01"])).contains("sample 2 of 'x': neither a picture"));
    assert!(message(apply(&preprocessor, &[&good[..20]])).contains("sample 1 of 'x'"));
    assert!(
        message(apply(&preprocessor, &[&good, &png(2, 3, |_, _| [0; 3])]))
            .contains("2 × 3 pixels, the first has 2 × 2")
    );
    assert!(message(apply(&preprocessor, &[])).contains("no sample"));
    for (picture, said) in [
        (Picture { input: "y".to_string(), ..plain() }, "no such input"),
        (Picture { mean: vec![1.0, 2.0], ..plain() }, "expected one finite value, or 3"),
        (Picture { deviation: vec![0.0], ..plain() }, "above 0"),
        (Picture { crop: Some([0, 5]), ..plain() }, "sides are 1 to"),
        (Picture { resize: Some(Resize::Exact([1 << 20, 5])), ..plain() }, "sides are 1 to"),
    ] {
        let error = of_picture(picture, DType::F32).unwrap_err().to_string();
        assert!(error.contains(said), "{error}");
    }
    assert!(of_picture(plain(), DType::String).unwrap_err().to_string().contains("can't be"));
}

const TOKENIZER: &str = r#"{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [
    {"id": 0, "content": "[PAD]", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}],
    "normalizer": {"type": "Lowercase"}, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
    "model": {"type": "WordLevel", "vocab": {"[PAD]": 0, "[UNK]": 1, "a": 2, "red": 3, "fox": 4}, "unk_token": "[UNK]"}}"#;

fn of_text(text: Text, tokenizer: Option<&str>) -> Result<Preprocessor, InputError> {
    let described = Preprocessing { pictures: Vec::new(), texts: vec![text] };
    let dtype = |name: &str| match name {
        "input_ids" => Some(DType::I64),
        "attention_mask" => Some(DType::I32),
        _ => None,
    };
    Preprocessor::new(described, tokenizer.map(str::as_bytes), dtype)
}

#[test]
fn texts_become_tokens_padded_and_cut() {
    let text = Text { mask: Some("attention_mask".to_string()), length: 3, ..Text::default() };
    let preprocessor = of_text(text.clone(), Some(TOKENIZER)).unwrap();
    let raw = Raw { name: "text", samples: vec![b"A fox", b"a red fox a red fox"] };
    let made = preprocessor.apply(&raw).unwrap();
    assert_eq!(made[0].0, "input_ids");
    assert_eq!(made[0].1.shape().dims(), [2, 3]);
    assert_eq!(made[0].1.to_vec::<i64>().unwrap(), [2, 4, 0, 2, 3, 4]);
    assert_eq!(made[1].1.to_vec::<i32>().unwrap(), [1, 1, 0, 1, 1, 1]);
    let short = Raw { name: "text", samples: vec![b"fox"] };
    assert_eq!(preprocessor.apply(&short).unwrap()[0].1.shape().dims(), [1, 1]);
    let padded = of_text(Text { pad_to_length: true, ..text }, Some(TOKENIZER)).unwrap();
    assert_eq!(padded.apply(&short).unwrap()[0].1.to_vec::<i64>().unwrap(), [4, 0, 0]);
}

#[test]
fn bad_texts_and_tokenizers_are_named() {
    let error = |result: Result<Preprocessor, InputError>| result.unwrap_err().to_string();
    assert!(error(of_text(Text::default(), None)).contains("need a tokenizer.json"));
    assert!(error(of_text(Text::default(), Some("{}"))).contains("tokenizer.json"));
    assert!(
        error(of_text(Text { ids: "no".to_string(), ..Text::default() }, Some(TOKENIZER))).contains("no such input")
    );
    assert!(error(of_text(Text { length: 0, ..Text::default() }, Some(TOKENIZER))).contains("length 0"));
    let preprocessor = of_text(Text::default(), Some(TOKENIZER)).unwrap();
    let raw = Raw { name: "text", samples: vec![b"fox", &[0xff, 0xfe]] };
    assert!(preprocessor.apply(&raw).unwrap_err().to_string().contains("sample 2 of 'text': not UTF-8"));
    let raw = Raw { name: "other", samples: vec![b"fox"] };
    assert!(preprocessor.apply(&raw).unwrap_err().to_string().contains("'other' is nothing"));
}

#[test]
fn a_description_is_read_as_it_was_written() {
    let described = Preprocessing {
        pictures: vec![Picture { resize: Some(Resize::Shorter(256)), crop: Some([224, 224]), ..plain() }],
        texts: vec![Text { types: Some("token_type_ids".to_string()), ..Text::default() }],
    };
    let text = serde_json::to_string(&described).unwrap();
    assert_eq!(serde_json::from_str::<Preprocessing>(&text).unwrap(), described);
    assert!(serde_json::from_str::<Preprocessing>(r#"{"pictures": [{"input": "x", "croop": [1, 1]}]}"#).is_err());
}
