//! The header is that of the code, and a C program that includes it runs the digits.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

fn here() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn the_header_is_generated_from_the_code() {
    let config = cbindgen::Config::from_file(here().join("cbindgen.toml")).unwrap();
    let mut generated = Vec::new();
    let source = here().join("src/lib.rs");
    cbindgen::Builder::new().with_config(config).with_src(source).generate().unwrap().write(&mut generated);
    let generated = String::from_utf8(generated).unwrap();
    let path = here().join("include/cutover.h");
    if std::env::var_os("CUTOVER_WRITE_HEADER").is_some() {
        std::fs::write(&path, &generated).unwrap();
    }
    let message = "differs from the code; CUTOVER_WRITE_HEADER=1 cargo test -p cutover-capi writes it";
    assert!(std::fs::read_to_string(&path).unwrap_or_default() == generated, "include/cutover.h {message}");
}

/// The library that cargo built for this test.
fn library() -> PathBuf {
    let folder = std::env::current_exe().unwrap().parent().unwrap().to_path_buf();
    let name = |p: &Path| {
        p.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.starts_with("libcutover_capi") && n.ends_with(".so"))
    };
    let found = |folder: &Path| {
        std::fs::read_dir(folder)
            .ok()?
            .flatten()
            .map(|e| e.path())
            .filter(|p| name(p))
            .max_by_key(|p| p.metadata().and_then(|m| m.modified()).ok())
    };
    found(&folder).or_else(|| found(folder.parent().unwrap())).expect("the cdylib that cargo builds with this test")
}

#[test]
fn a_c_program_runs_the_digits() {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("digits");
    let library = library();
    let compiled = Command::new("cc")
        .args(["-std=c99", "-Wall", "-Wextra", "-Werror", "-o"])
        .arg(&program)
        .arg(here().join("tests/digits.c"))
        .arg("-I")
        .arg(here().join("include"))
        .arg(&library)
        .arg(format!("-Wl,-rpath,{}", library.parent().unwrap().display()))
        .status()
        .expect("a C compiler");
    assert!(compiled.success());
    let model = here().join("../../models/digits/v1/model.onnx");
    let run = Command::new(&program).arg(model).output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&run.stdout), String::from_utf8_lossy(&run.stderr));
    assert!(run.status.success(), "{out}{err}");
    assert!(out.contains("the digit is 5"), "{out}");
}
