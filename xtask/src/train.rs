//! Training of the models that the repository ships.
//!
//! candle takes minutes to build, so it is behind the feature `train`: without it this task starts itself again with it,
//! on one thread, which is what makes the result the same bytes each time.

use anyhow::Result;
use std::path::Path;

#[cfg(not(feature = "train"))]
pub fn train(model: &str, output: &Path) -> Result<()> {
    let output = std::path::absolute(output)?;
    let output = output.to_str().ok_or_else(|| anyhow::anyhow!("{} is not UTF-8", output.display()))?;
    let arguments = ["run", "--release", "--package", "xtask", "--features", "train", "--"];
    let task = ["train", model, "--output", output];
    crate::cargo(&[&arguments[..], &task[..]].concat(), &[("RAYON_NUM_THREADS", "1")])
}

#[cfg(feature = "train")]
pub fn train(model: &str, output: &Path) -> Result<()> {
    match model {
        "digits" => digits::train(output),
        _ => anyhow::bail!("there is no recipe for '{model}'; there is one for digits"),
    }
}

#[cfg(feature = "train")]
mod digits {
    use anyhow::{Context, Result, bail};
    use cutover::{
        Device, Model, Tensor,
        graph::onnx::{Weights, export},
    };
    use cutover_shrink::{
        Data,
        train::{Fit, Layer, Losses, Network, fit},
    };
    use std::{fs, ops::ControlFlow, path::Path, time::Instant};

    const SIDE: usize = 8;
    const PIXELS: usize = SIDE * SIDE;

    /// Images with the class of each.
    #[derive(Default)]
    struct Examples {
        /// `[n, height, width]`, row-major.
        images: Vec<f32>,
        labels: Vec<i64>,
    }

    /// One version: how wide its layers are, and how much of the training data it saw.
    struct Recipe {
        version: &'static str,
        channels: [usize; 2],
        units: usize,
        /// The first so many of the training images; all of them if there are fewer.
        images: usize,
        epochs: usize,
        about: &'static str,
    }

    const RECIPES: [Recipe; 3] = [
        Recipe { version: "v1", channels: [16, 32], units: 64, images: usize::MAX, epochs: 8, about: "the first" },
        Recipe { version: "v2", channels: [8, 16], units: 32, images: usize::MAX, epochs: 12, about: "half as wide" },
        Recipe { version: "v3", channels: [8, 16], units: 32, images: 100, epochs: 90, about: "trained on 100 images" },
    ];

    pub fn train(output: &Path) -> Result<()> {
        let data = crate::root().join("models/digits/data/digits.csv");
        let text = fs::read_to_string(&data).with_context(|| format!("cannot read {}", data.display()))?;
        let (training, held_out) = split(&text).with_context(|| format!("in {}", data.display()))?;
        println!("{} images to train on, {} held out", training.labels.len(), held_out.labels.len());
        for recipe in &RECIPES {
            let folder = output.join(recipe.version);
            fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
            let start = Instant::now();
            train_one(recipe, &training, &folder)?;
            let right = right_answers(&folder.join("model.onnx"), &held_out)?;
            let accuracy = 100.0 * right as f64 / held_out.labels.len() as f64;
            println!(
                "{}: accuracy {accuracy:.2} % ({right} of {} held out), {} bytes of weights, {:.1} s ({})",
                recipe.version,
                held_out.labels.len(),
                fs::metadata(folder.join("weights.safetensors"))?.len(),
                start.elapsed().as_secs_f64(),
                recipe.about,
            );
        }
        Ok(())
    }

    fn train_one(recipe: &Recipe, training: &Examples, folder: &Path) -> Result<()> {
        let count = recipe.images.min(training.labels.len());
        let [first, second] = recipe.channels;
        let network = Network {
            input: [1, SIDE, SIDE],
            layers: vec![
                Layer::Convolution { channels: first, kernel: 3 },
                Layer::Relu,
                Layer::Convolution { channels: second, kernel: 3 },
                Layer::Relu,
                Layer::MaxPool { size: 2 },
                Layer::Linear { units: recipe.units },
                Layer::Relu,
                Layer::Linear { units: 10 },
            ],
        };
        let options = Fit {
            epochs: recipe.epochs,
            batch: 32,
            rate: 2e-3,
            seed: 20,
            losses: Losses { soft: 0.0, labels: 1.0, ..Losses::default() },
            ..Fit::default()
        };
        let data = samples(training, count, usize::from(count > 1000))?;
        let backend = cutover::backend::cpu(cutover::backend::CpuOptions { threads: 1, ..Default::default() })?;
        let graph = network.graph("digits", options.seed)?;
        let fitted = fit(&graph, None, &data, None, &options, &backend, &mut |progress| {
            if progress.step % 500 == 0 {
                eprintln!(
                    "{}: step {} of {}, loss {:.4}",
                    recipe.version, progress.step, progress.steps, progress.loss
                );
            }
            ControlFlow::Continue(())
        })?;
        let weights = Weights::Safetensors { file_name: "weights.safetensors".to_string() };
        Ok(export(&fitted.graph, &folder.join("model.onnx"), &weights)?)
    }

    /// The first `count` images, each shifted by up to `shift` pixels every way, zeros moving in.
    fn samples(examples: &Examples, count: usize, shift: usize) -> Result<Data> {
        let mut data = Data::default();
        let mut labels = Vec::new();
        let offsets = || (0..=2 * shift).map(|offset| offset as isize - shift as isize);
        for (image, &label) in examples.images.chunks_exact(PIXELS).zip(&examples.labels).take(count) {
            for (down, right) in offsets().flat_map(|down| offsets().map(move |right| (down, right))) {
                let mut shifted = vec![0.0; PIXELS];
                for (at, pixel) in shifted.iter_mut().enumerate() {
                    let from = ((at / SIDE).checked_add_signed(-down), (at % SIDE).checked_add_signed(-right));
                    if let (Some(y), Some(x)) = from
                        && y < SIDE
                        && x < SIDE
                    {
                        *pixel = image[y * SIDE + x];
                    }
                }
                let tensor = Tensor::from_vec([1, 1, SIDE, SIDE], shifted)?;
                data.samples.push(vec![("image".to_string(), tensor.into())]);
                labels.push(vec![label]);
            }
        }
        data.labels = Some(labels);
        Ok(data)
    }

    /// How many of `examples` the written file answers right.
    fn right_answers(path: &Path, examples: &Examples) -> Result<usize> {
        let mut session = Model::open(path)?.compile(Device::Auto)?.session()?;
        let count = examples.labels.len();
        let images = cutover::Tensor::from_vec([count, 1, SIDE, SIDE], examples.images.clone())?;
        let answers = session.run([("image", images.view())])?;
        let probabilities = answers.get("probabilities").context("the model has no output 'probabilities'")?;
        let probabilities = probabilities.as_slice::<f32>()?;
        let classes = probabilities.len() / count;
        let best = |row: &[f32]| (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b]));
        let right = probabilities.chunks_exact(classes).zip(&examples.labels);
        Ok(right.filter(|(row, label)| best(row) == Some(**label as usize)).count())
    }

    /// The images to train on, and every third one, which is held out.
    fn split(text: &str) -> Result<(Examples, Examples)> {
        let (mut training, mut held_out) = (Examples::default(), Examples::default());
        for (index, line) in text.lines().enumerate() {
            let numbers: Vec<i64> = line
                .split(',')
                .map(str::parse)
                .collect::<Result<_, _>>()
                .with_context(|| format!("line {}", index + 1))?;
            let Some((&label, pixels)) = numbers.split_last().filter(|(_, pixels)| pixels.len() == PIXELS) else {
                bail!("line {} has {} numbers, expected {}", index + 1, numbers.len(), PIXELS + 1);
            };
            let set = if index % 3 == 2 { &mut held_out } else { &mut training };
            set.images.extend(pixels.iter().map(|&p| p as f32 / 16.0));
            set.labels.push(label);
        }
        Ok((training, held_out))
    }
}
