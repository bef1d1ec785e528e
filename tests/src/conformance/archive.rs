//! The archive of the cases.

use std::{
    collections::BTreeMap,
    io::{self, Read},
    path::{Component, Path},
};

const ARCHIVE: &[u8] = include_bytes!("../../onnx/onnx-1.23.2-node.tar.zst");

/// A model and what it must answer.
#[derive(Clone, Debug, Default)]
pub struct Case {
    pub name: String,
    /// `node`, one operator; or `simple`, a few.
    pub suite: String,
    pub model: Vec<u8>,
    pub data: Vec<DataSet>,
}

/// Serialised values in the order of the model's inputs and outputs.
#[derive(Clone, Debug, Default)]
pub struct DataSet {
    pub inputs: Vec<Vec<u8>>,
    pub outputs: Vec<Vec<u8>>,
}

/// All cases, by name.
#[derive(Clone, Debug)]
pub struct Cases(pub Vec<Case>);

impl Cases {
    /// Unpacks the archive that the repository holds.
    ///
    /// # Errors
    /// An archive that is not laid out as `SUITE/CASE/model.onnx` and `SUITE/CASE/test_data_set_N/{input,output}_M.pb`.
    pub fn load() -> io::Result<Cases> {
        let decoder = ruzstd::decoding::StreamingDecoder::new(ARCHIVE).map_err(io::Error::other)?;
        let mut cases: BTreeMap<(String, String), Files> = BTreeMap::new();
        for entry in tar::Archive::new(decoder).entries()? {
            let mut entry = entry?;
            if !entry.header().entry_type().is_file() {
                continue;
            }
            let path = entry.path()?.into_owned();
            let parts = parts(&path);
            let [suite, case, file @ ..] = parts.as_slice() else { return Err(unexpected(&path)) };
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes)?;
            cases.entry((suite.clone(), case.clone())).or_default().insert(file.join("/"), bytes);
        }
        Ok(Cases(cases.into_iter().map(|((suite, name), files)| case(suite, name, files)).collect()))
    }
}

type Files = BTreeMap<String, Vec<u8>>;

fn parts(path: &Path) -> Vec<String> {
    let normal = |part| if let Component::Normal(part) = part { part.to_str().map(str::to_string) } else { None };
    path.components().filter_map(normal).collect()
}

fn unexpected(path: &Path) -> io::Error {
    io::Error::other(format!("'{}' has no place in the archive of cases", path.display()))
}

fn case(suite: String, name: String, mut files: Files) -> Case {
    let model = files.remove("model.onnx").unwrap_or_default();
    let take = |set: usize, kind: &str| -> Vec<Vec<u8>> {
        let file = |at: usize| files.get(&format!("test_data_set_{set}/{kind}_{at}.pb")).cloned();
        (0..).map_while(file).collect()
    };
    let holds = |set: &usize| files.keys().any(|file| file.starts_with(&format!("test_data_set_{set}/")));
    let data = (0..).take_while(holds).map(|set| DataSet { inputs: take(set, "input"), outputs: take(set, "output") });
    let data = data.collect();
    Case { name, suite, model, data }
}
