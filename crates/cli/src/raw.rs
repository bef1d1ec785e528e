//! Samples that are no tensors yet: pictures in a folder, texts in a file, rows of a table.

use crate::tensors::{self, Named};
use anyhow::{Context, Result, anyhow, bail};
use cutover::{
    DType, Tensor,
    backend::Signature,
    input::{InputError, Preprocessing, Preprocessor},
};
use std::{
    fs,
    path::{Path, PathBuf},
};

const PREPROCESS: &str = "How pictures and texts become inputs, as TOML or JSON, e.g. [[pictures]] input = \"image\", resize = { shorter = 256 }, \
    crop = [224, 224], mean = [0.485, 0.456, 0.406], deviation = [0.229, 0.224, 0.225]; or [[texts]] ids = \"input_ids\", \
    mask = \"attention_mask\", length = 128";

/// How pictures and texts become the model's inputs, where no package says so.
#[derive(clap::Args)]
pub(crate) struct PreprocessArguments {
    #[arg(long, value_name = "FILE", help = PREPROCESS)]
    preprocess: Option<PathBuf>,
    /// A tokenizer.json, for texts.
    #[arg(long, value_name = "FILE", requires = "preprocess")]
    tokenizer: Option<PathBuf>,
}

impl PreprocessArguments {
    /// The description and the tokenizer, where they were given.
    pub fn read(&self) -> Result<Option<(Preprocessing, Option<Vec<u8>>)>> {
        let Some(path) = &self.preprocess else { return Ok(None) };
        let at = || format!("cannot read {}", path.display());
        let text = fs::read_to_string(path).with_context(at)?;
        let described: Preprocessing = match path.extension().and_then(|e| e.to_str()) {
            Some("toml") => toml::from_str(&text).with_context(at)?,
            Some("json") => serde_json::from_str(&text).with_context(at)?,
            _ => bail!("{}: expected a file ending in .toml or .json", path.display()),
        };
        if described.is_empty() {
            bail!("{} describes neither [[pictures]] nor [[texts]]", path.display());
        }
        let tokenizer = match &self.tokenizer {
            Some(path) => Some(fs::read(path).with_context(|| format!("cannot read {}", path.display()))?),
            None => None,
        };
        Ok(Some((described, tokenizer)))
    }
}

/// Samples as they lie in files, with the class of each where that is known.
pub(crate) struct Samples {
    samples: Vec<Sample>,
    pub labels: Option<Vec<i64>>,
    kind: Kind,
}

struct Sample {
    /// Where it lies: a file, or a line of one.
    place: String,
    bytes: Vec<u8>,
}

impl Sample {
    fn picture(path: &Path) -> Result<Sample> {
        let place = path.display().to_string();
        let bytes = fs::read(path).with_context(|| format!("cannot read {place}"))?;
        Ok(Sample { place, bytes })
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Picture,
    Text,
}

const PICTURES: &[&str] = &["png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff", "pnm", "ppm", "pgm"];

fn ending(path: &Path) -> String {
    path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase()
}

/// Whether what lies at `path` is no file of tensors.
pub(crate) fn is_raw(path: &Path) -> bool {
    path.is_dir() || ending(path) == "txt" || PICTURES.contains(&&*ending(path))
}

/// Reads a picture, a folder of pictures (or of folders of them, one for each class, in the order of their names), or a text file of a sample
/// to a line. Folders are read in the order of their names, at most `most` samples.
pub(crate) fn read(path: &Path, most: usize) -> Result<Samples> {
    let at = || format!("cannot read {}", path.display());
    if path.is_dir() {
        return folder(path, most);
    }
    if ending(path) == "txt" {
        let text = fs::read_to_string(path).with_context(at)?;
        let lines = text.lines().map(str::trim).enumerate().filter(|(_, line)| !line.is_empty());
        let sample = |(index, line): (usize, &str)| Sample {
            place: format!("{}, line {}", path.display(), index + 1),
            bytes: line.as_bytes().to_vec(),
        };
        let samples = lines.take(most).map(sample).collect();
        return Ok(Samples { samples, labels: None, kind: Kind::Text });
    }
    Ok(Samples { samples: vec![Sample::picture(path)?], labels: None, kind: Kind::Picture })
}

fn folder(path: &Path, most: usize) -> Result<Samples> {
    let (classes, pictures) = entries(path)?;
    if classes.is_empty() {
        let samples = pictures.iter().take(most).map(|path| Sample::picture(path)).collect::<Result<_>>()?;
        return Ok(Samples { samples, labels: None, kind: Kind::Picture });
    }
    if let Some(stray) = pictures.first() {
        bail!("{} lies beside folders of classes, and belongs to none", stray.display());
    }
    // A class after the other in turn, so that the first so many samples are of all of them.
    let classes = classes.iter().map(|class| Ok(entries(class)?.1)).collect::<Result<Vec<_>>>()?;
    let (mut samples, mut labels) = (Vec::new(), Vec::new());
    for round in 0..classes.iter().map(Vec::len).max().unwrap_or(0) {
        for (label, pictures) in classes.iter().enumerate() {
            if let Some(path) = pictures.get(round).filter(|_| samples.len() < most) {
                samples.push(Sample::picture(path)?);
                labels.push(label as i64);
            }
        }
    }
    Ok(Samples { samples, labels: Some(labels), kind: Kind::Picture })
}

/// Folders and pictures in a folder, by name. What starts with a dot is left out.
fn entries(path: &Path) -> Result<(Vec<PathBuf>, Vec<PathBuf>)> {
    let at = || format!("cannot read {}", path.display());
    let mut all: Vec<PathBuf> =
        fs::read_dir(path).with_context(at)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>().with_context(at)?;
    all.retain(|path| !path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.')));
    all.sort();
    let (folders, files): (Vec<PathBuf>, Vec<PathBuf>) = all.into_iter().partition(|path| path.is_dir());
    Ok((folders, files.into_iter().filter(|path| PICTURES.contains(&&*ending(path))).collect()))
}

impl Samples {
    pub fn len(&self) -> usize {
        self.samples.len()
    }

    /// What the samples are called: the one input made of such.
    fn name<'a>(&self, preprocessor: &'a Preprocessor) -> Result<&'a str> {
        let described = preprocessor.described();
        let (names, what): (Vec<&str>, _) = match self.kind {
            Kind::Picture => (described.pictures.iter().map(|p| p.input.as_str()).collect(), "picture"),
            Kind::Text => (described.texts.iter().map(|t| t.name.as_str()).collect(), "text"),
        };
        match names[..] {
            [one] => Ok(one),
            [] => bail!("nothing says how a {what} becomes an input of the model"),
            _ => bail!("the model takes several {what}s ({}): give tensors", names.join(", ")),
        }
    }

    /// The inputs of the samples in `range`, in one run.
    pub fn inputs(&self, preprocessor: Option<&Preprocessor>, range: std::ops::Range<usize>) -> Result<Named> {
        let preprocessor = preprocessor.context(
            "pictures and texts need to know how they become inputs: give --preprocess, or a package that was packed with it",
        )?;
        let name = self.name(preprocessor)?;
        let chosen = &self.samples[range];
        let samples = chosen.iter().map(|sample| sample.bytes.as_slice()).collect();
        preprocessor.apply(&cutover::input::Raw { name, samples }).map_err(|error| match error {
            InputError::Sample { number, message, .. } => anyhow!("{}: {message}", chosen[number - 1].place),
            error => error.into(),
        })
    }
}

pub(crate) fn is_table(path: &Path) -> bool {
    path.extension().is_some_and(|ending| ending == "csv")
}

/// The tensors in a file of any kind, of a model with these inputs.
pub(crate) fn tensors(path: &Path, signature: &Signature) -> Result<Named> {
    if is_table(path) {
        return table(path, signature);
    }
    let only = match &signature.inputs[..] {
        [one] => Some(one.name.as_str()),
        _ => None,
    };
    tensors::read(path, only)
}

/// A table with a header: columns of the inputs' names, or all columns as the one input's last axis; `label` or `labels` are classes.
fn table(path: &Path, signature: &Signature) -> Result<Named> {
    let at = || format!("cannot read {}", path.display());
    let mut reader = csv::ReaderBuilder::new().trim(csv::Trim::All).from_path(path).with_context(at)?;
    let header: Vec<String> = reader.headers().with_context(at)?.iter().map(str::to_string).collect();
    let mut columns: Vec<Vec<String>> = vec![Vec::new(); header.len()];
    for row in reader.records() {
        let row = row.with_context(at)?;
        columns.iter_mut().zip(row.iter()).for_each(|(column, cell)| column.push(cell.to_string()));
    }
    let is_label = |name: &str| matches!(name, "label" | "labels");
    let is_input = |name: &str| signature.inputs.iter().any(|binding| binding.name == name);
    let numbers = |index: usize| -> Result<Vec<f64>> {
        let parse = |(row, cell): (usize, &String)| {
            let line = row + 2;
            cell.parse::<f64>().with_context(|| {
                format!("{}, line {line}, column '{}': '{cell}' is no number", path.display(), header[index])
            })
        };
        columns[index].iter().enumerate().map(parse).collect()
    };
    let mut named = Named::new();
    let by_name = header.iter().any(|name| is_input(name));
    if by_name {
        for (index, name) in header.iter().enumerate().filter(|(_, name)| is_input(name)) {
            let binding = signature.inputs.iter().find(|binding| binding.name == *name).context("an input")?;
            let fact = binding.fact.as_tensor().with_context(|| format!("input '{name}' is no tensor"))?;
            // One value to a sample: `[samples]`, or `[samples, 1]`.
            let rank = fact.shape.as_ref().map_or(1, |dims| dims.len()).max(1);
            let shape = [vec![columns[index].len()], vec![1; rank - 1]].concat();
            let tensor = match fact.dtype {
                DType::String => Tensor::from_strings(shape, columns[index].clone())?,
                dtype => of_numbers(dtype, shape, numbers(index)?).with_context(|| format!("input '{name}'"))?,
            };
            named.push((name.clone(), tensor));
        }
    } else {
        let [binding] = &signature.inputs[..] else {
            let names = signature.inputs.iter().map(|b| b.name.as_str()).collect::<Vec<_>>().join(", ");
            bail!("{}: none of its columns is called as an input of the model ({names})", path.display());
        };
        let fact = binding.fact.as_tensor().with_context(|| format!("input '{}' is no tensor", binding.name))?;
        let features: Vec<usize> = (0..header.len()).filter(|&index| !is_label(&header[index])).collect();
        let values = features.iter().map(|&index| numbers(index)).collect::<Result<Vec<_>>>()?;
        let rows = values.first().map_or(0, Vec::len);
        let by_row = (0..rows).flat_map(|row| values.iter().map(move |column| column[row])).collect();
        // A picture in columns gets the shape that the model gives it.
        let dims =
            fact.shape.as_ref().map(|dims| dims.iter().skip(1).map(|d| d.as_const()).collect::<Option<Vec<_>>>());
        let dims: Vec<usize> = match dims.flatten() {
            Some(dims) if !dims.is_empty() => dims.into_iter().map(|d| usize::try_from(d).unwrap_or(0)).collect(),
            _ => vec![features.len()],
        };
        if dims.iter().product::<usize>() != features.len() {
            let unlabelled = features.len() == header.len();
            bail!(
                "{}: {} columns of features, input '{}' takes {dims:?}{}",
                path.display(),
                features.len(),
                binding.name,
                if unlabelled { "; a column of classes is called 'label'" } else { "" }
            );
        }
        let shape = [vec![rows], dims].concat();
        named.push((binding.name.clone(), of_numbers(fact.dtype, shape, by_row)?));
    }
    if let Some(index) = header.iter().position(|name| is_label(name) && !is_input(name)) {
        let classes = of_numbers(DType::I64, vec![columns[index].len()], numbers(index)?);
        let at = || format!("{}, column '{}'", path.display(), header[index]);
        named.push(("labels".to_string(), classes.with_context(at)?));
    }
    Ok(named)
}

fn of_numbers(dtype: DType, shape: Vec<usize>, values: Vec<f64>) -> Result<Tensor> {
    let is_float = matches!(dtype, DType::F32 | DType::F64);
    if let Some(value) = values.iter().find(|value| !is_float && value.fract() != 0.0) {
        bail!("{value} is no {dtype}");
    }
    Ok(match dtype {
        DType::F32 => Tensor::from_vec(shape, values.into_iter().map(|v| v as f32).collect::<Vec<_>>())?,
        DType::F64 => Tensor::from_vec(shape, values)?,
        DType::I64 => Tensor::from_vec(shape, values.into_iter().map(|v| v as i64).collect::<Vec<_>>())?,
        DType::I32 => Tensor::from_vec(shape, values.into_iter().map(|v| v as i32).collect::<Vec<_>>())?,
        DType::U8 => Tensor::from_vec(shape, values.into_iter().map(|v| v as u8).collect::<Vec<_>>())?,
        _ => bail!("a column of numbers can't be {dtype}"),
    })
}
