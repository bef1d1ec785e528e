//! Pictures that Pillow 13 (libjpeg-turbo 3) wrote and decoded: `files/`, 11 × 19 pixels each.

use super::*;
use crate::ops::cases::{Case, case, tensor};

fn node(file: &[u8]) -> Case {
    case("ImageDecoder", 20).input(tensor::<u8>(&[file.len()], file))
}

/// FNV-1a.
fn digest(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

#[test]
fn jpeg_agrees_with_libjpeg_turbo_to_the_bit() {
    let files: [(&str, &[u8], u64); 6] = [
        ("444", include_bytes!("files/444.jpg"), 0x8e72_5192_56a4_05ed),
        ("422", include_bytes!("files/422.jpg"), 0xce87_1799_64f7_219e),
        ("420", include_bytes!("files/420.jpg"), 0xfc5c_95ba_af42_bec8),
        ("progressive", include_bytes!("files/progressive.jpg"), 0xfc5c_95ba_af42_bec8),
        ("restart", include_bytes!("files/restart.jpg"), 0xce87_1799_64f7_219e),
        ("grey", include_bytes!("files/grey.jpg"), 0x2efb_f36f_e38e_9259),
    ];
    for (name, file, expected) in files {
        let picture = Picture::decode(file, PIXELS_MAX).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!((picture.height, picture.width), (11, 19), "{name}");
        assert_eq!(digest(&picture.pixels), expected, "{name}");
    }
}

#[test]
fn no_cut_or_changed_jpeg_panics() {
    for file in [&include_bytes!("files/progressive.jpg")[..], include_bytes!("files/restart.jpg")] {
        for end in 0..file.len() {
            assert!(Picture::decode(&file[..end], PIXELS_MAX).is_err(), "{end} bytes");
        }
        for at in 0..file.len() {
            for value in [0, 1, 0x7f, 0xff, !file[at]] {
                let mut file = file.to_vec();
                file[at] = value;
                let _ = Picture::decode(&file, 1 << 12);
            }
        }
    }
}

#[test]
fn formats_of_pixels() {
    let file = b"P6 2 1 255\n\x01\x02\x03\xff\x80\x00";
    node(file).gives([tensor::<u8>(&[1, 2, 3], &[1, 2, 3, 255, 128, 0])]);
    node(file).with("pixel_format", "BGR").gives([tensor::<u8>(&[1, 2, 3], &[3, 2, 1, 0, 128, 255])]);
    node(file).with("pixel_format", "Grayscale").gives([tensor::<u8>(&[1, 2, 1], &[2, 151])]);
    node(b"P5 1 2 255\n\x07\x09").gives([tensor::<u8>(&[2, 1, 3], &[7, 7, 7, 9, 9, 9])]);
    node(file).with("pixel_format", "CMYK").fails("must be RGB, BGR or Grayscale");
}

#[test]
fn what_is_no_picture_is_empty() {
    for file in [&b""[..], b"P6 2 1 255\n\x01", b"\xff\xd8\xff", b"no picture", b"\x89PNG\r\n\x1a\n"] {
        node(file).gives([tensor::<u8>(&[0, 0, 3], &[])]);
    }
}

#[test]
fn sizes_are_bounded_before_memory_is_taken() {
    let mut file = include_bytes!("files/444.jpg").to_vec();
    let frame = file.windows(2).position(|marker| marker == [0xff, 0xc0]).expect("a sequential picture");
    file[frame + 5..frame + 9].fill(0xff);
    node(&file).fails("65535 × 65535 pixels");
    node(b"P6 100000 100000 255\n").fails("resource limit");
}
