//! Training of small convolutional networks on candle, from seeded weights and in a seeded order.
//!
//! candle's own random numbers can't be seeded on the CPU, so none are used: weights and shuffles come from ChaCha8. With
//! one thread (`RAYON_NUM_THREADS=1`) the same options give the same bytes on the same machine. What comes out is a
//! [`Graph`]: nothing downstream knows candle.

#[path = "graph.rs"]
mod graph;
#[cfg(test)]
#[path = "tests.rs"]
mod tests;

use candle_core::{D, DType, Device, Tensor, Var};
use candle_nn::{AdamW, Optimizer, ParamsAdamW};
use cutover_graph::Graph;
use rand_chacha::{ChaCha8Rng, rand_core::Rng, rand_core::SeedableRng};

/// A chain of layers over images `[n, channels, height, width]`.
#[derive(Clone, Debug)]
pub struct Network {
    /// Channels, height and width of an image.
    pub input: [usize; 3],
    pub layers: Vec<Layer>,
}

/// One layer of a [`Network`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layer {
    /// Stride 1, an odd square kernel, padded so that height and width stay.
    Convolution {
        channels: usize,
        kernel: usize,
    },
    Relu,
    /// Window and stride `size`; a remainder is dropped.
    MaxPool {
        size: usize,
    },
    /// Flattens what comes, then `x · Wᵀ + b`.
    Linear {
        units: usize,
    },
}

/// Images with the class of each.
#[derive(Clone, Debug, Default)]
pub struct Examples {
    /// `[n, channels, height, width]`, row-major.
    pub images: Vec<f32>,
    /// `[n]`.
    pub labels: Vec<u32>,
}

#[derive(Clone, Debug)]
pub struct TrainOptions {
    pub epochs: usize,
    pub batch: usize,
    /// At the start; falls to 0 along half a cosine.
    pub learning_rate: f64,
    pub weight_decay: f64,
    /// Every image is shifted by up to this many pixels each way, anew in every epoch, zeros moving in.
    pub shift: usize,
    pub seed: u64,
}

/// What an epoch came to.
#[derive(Clone, Copy, Debug)]
pub struct Epoch {
    pub number: usize,
    pub of: usize,
    /// Mean cross-entropy over the epoch, in nats.
    pub loss: f64,
}

/// Why a network could not be trained.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    #[error("layer {layer}: {message}")]
    Network { layer: usize, message: String },
    #[error("examples: {0}")]
    Examples(String),
    #[error("training: {0}")]
    Candle(#[from] candle_core::Error),
    #[error("the trained network's graph: {0}")]
    Graph(#[from] cutover_graph::GraphError),
}

/// A network with its weights.
pub struct Trained {
    network: Network,
    /// Weight and bias of every layer that has some, in order.
    parameters: Vec<(Var, Var)>,
}

/// Minimises the mean cross-entropy of `network` over `examples` with AdamW (Loshchilov and Hutter 2019), telling `progress`
/// after every epoch.
///
/// # Errors
/// A layer that does not fit its input, or examples whose number of pixels or labels is wrong.
pub fn train(
    network: &Network,
    examples: &Examples,
    options: &TrainOptions,
    progress: &mut dyn FnMut(Epoch),
) -> Result<Trained, TrainError> {
    let count = examples.labels.len();
    let classes = check(network, examples)?;
    let mut random = ChaCha8Rng::seed_from_u64(options.seed);
    let trained = Trained::initial(network, &mut random)?;
    let variables = trained.parameters.iter().flat_map(|(w, b)| [w.clone(), b.clone()]).collect();
    let settings =
        ParamsAdamW { lr: options.learning_rate, weight_decay: options.weight_decay, ..ParamsAdamW::default() };
    let mut optimizer = AdamW::new(variables, settings)?;
    let batches = count.div_ceil(options.batch.max(1));
    let mut order: Vec<usize> = (0..count).collect();
    for epoch in 0..options.epochs {
        shuffle(&mut order, &mut random);
        let mut loss_sum = 0.0;
        for (step, batch) in order.chunks(options.batch.max(1)).enumerate() {
            let done = (epoch * batches + step) as f64 / (options.epochs * batches) as f64;
            optimizer.set_learning_rate(options.learning_rate * 0.5 * (1.0 + (std::f64::consts::PI * done).cos()));
            let images = gather(network, examples, batch, options.shift, &mut random)?;
            let labels: Vec<u32> = batch.iter().map(|&i| examples.labels[i]).collect();
            let labels = Tensor::from_vec(labels, batch.len(), &Device::Cpu)?;
            let logits = trained.logits(&images)?;
            debug_assert_eq!(logits.dim(D::Minus1)?, classes);
            let loss = candle_nn::loss::cross_entropy(&logits, &labels)?;
            optimizer.backward_step(&loss)?;
            loss_sum += f64::from(loss.to_scalar::<f32>()?) * batch.len() as f64;
        }
        progress(Epoch { number: epoch + 1, of: options.epochs, loss: loss_sum / count as f64 });
    }
    Ok(trained)
}

impl Trained {
    /// Uniform weights within `±√(6 / fan_in)` (He et al. 2015), zero biases.
    fn initial(network: &Network, random: &mut ChaCha8Rng) -> Result<Trained, TrainError> {
        let mut parameters = Vec::new();
        for (weight, bias) in shapes(network)?.0.into_iter().flatten() {
            let bound = (6.0 / weight[1..].iter().product::<usize>() as f64).sqrt();
            let values: Vec<f32> =
                (0..weight.iter().product()).map(|_| ((2.0 * uniform(random) - 1.0) * bound) as f32).collect();
            let weight = Var::from_tensor(&Tensor::from_vec(values, weight, &Device::Cpu)?)?;
            parameters.push((weight, Var::zeros(bias, DType::F32, &Device::Cpu)?));
        }
        Ok(Trained { network: network.clone(), parameters })
    }

    /// `[n, classes]` of images `[n, c, h, w]`.
    fn logits(&self, images: &Tensor) -> Result<Tensor, candle_core::Error> {
        let mut parameters = self.parameters.iter();
        let mut x = images.clone();
        for layer in &self.network.layers {
            x = match *layer {
                Layer::Relu => x.relu()?,
                Layer::MaxPool { size } => x.max_pool2d(size)?,
                Layer::Convolution { kernel, .. } => {
                    let (weight, bias) = parameters.next().expect("a weight for every convolution");
                    let y = x.conv2d(weight, kernel / 2, 1, 1, 1)?;
                    y.broadcast_add(&bias.reshape((1, bias.elem_count(), 1, 1))?)?
                }
                Layer::Linear { .. } => {
                    let (weight, bias) = parameters.next().expect("a weight for every linear layer");
                    x.flatten_from(1)?.matmul(&weight.t()?)?.broadcast_add(bias)?
                }
            };
        }
        Ok(x)
    }

    /// The network as a graph called `name`: input `image [N, c, h, w]`, output `probabilities [N, classes]` through a softmax.
    ///
    /// # Errors
    /// Those of building a graph, which would be a mistake of this module.
    pub fn graph(&self, name: &str) -> Result<Graph, TrainError> {
        graph::build(name, &self.network, &self.parameters)
    }
}

type WeightAndBias = (Vec<usize>, Vec<usize>);

/// The shapes of every layer's weight and bias, and the shape of an example after the last layer.
fn shapes(network: &Network) -> Result<(Vec<Option<WeightAndBias>>, Vec<usize>), TrainError> {
    let mut shape = network.input.to_vec();
    let mut parameters = Vec::new();
    for (layer, kind) in network.layers.iter().enumerate() {
        let wrong = |message: String| TrainError::Network { layer, message };
        let image = |what: &str| match shape[..] {
            [c, h, w] => Ok((c, h, w)),
            _ => Err(wrong(format!("{what} needs an image, and comes after a linear layer"))),
        };
        let (parameter, next) = match *kind {
            Layer::Relu => (None, shape.clone()),
            Layer::Convolution { channels, kernel } => {
                let (c, h, w) = image("a convolution")?;
                if kernel % 2 == 0 {
                    return Err(wrong(format!("a kernel of {kernel}, expected an odd one")));
                }
                (Some((vec![channels, c, kernel, kernel], vec![channels])), vec![channels, h, w])
            }
            Layer::MaxPool { size } => {
                let (c, h, w) = image("a pooling layer")?;
                if size == 0 || size > h.min(w) {
                    return Err(wrong(format!("a window of {size} over an image of {h} by {w}")));
                }
                (None, vec![c, h / size, w / size])
            }
            Layer::Linear { units } => (Some((vec![units, shape.iter().product()], vec![units])), vec![units]),
        };
        parameters.push(parameter);
        shape = next;
    }
    Ok((parameters, shape))
}

/// The number of classes, once the network and the examples are known to fit each other.
fn check(network: &Network, examples: &Examples) -> Result<usize, TrainError> {
    let (_, output) = shapes(network)?;
    let &[classes] = &output[..] else {
        let message = "the last layer with weights must be linear: its units are the classes".to_string();
        return Err(TrainError::Network { layer: network.layers.len().saturating_sub(1), message });
    };
    let (count, pixels) = (examples.labels.len(), network.input.iter().product::<usize>());
    if count == 0 || examples.images.len() != count * pixels {
        let message = format!("{} pixels for {count} labels, expected {pixels} pixels each", examples.images.len());
        return Err(TrainError::Examples(message));
    }
    if let Some(at) = examples.labels.iter().position(|&label| label as usize >= classes) {
        let message = format!("label {} of example {at}, expected one below {classes}", examples.labels[at]);
        return Err(TrainError::Examples(message));
    }
    Ok(classes)
}

/// The images of `batch` as a tensor, each shifted at random.
fn gather(
    network: &Network,
    examples: &Examples,
    batch: &[usize],
    shift: usize,
    random: &mut ChaCha8Rng,
) -> Result<Tensor, candle_core::Error> {
    let [c, h, w] = network.input;
    let mut images = vec![0.0; batch.len() * c * h * w];
    for (&example, image) in batch.iter().zip(images.chunks_exact_mut(c * h * w)) {
        let from = &examples.images[example * c * h * w..][..c * h * w];
        let mut offset = || below(random, 2 * shift + 1) as isize - shift as isize;
        let (down, right) = (offset(), offset());
        for (plane, to) in from.chunks_exact(h * w).zip(image.chunks_exact_mut(h * w)) {
            for y in 0..h {
                for x in 0..w {
                    let source = (y.checked_add_signed(-down), x.checked_add_signed(-right));
                    if let (Some(sy), Some(sx)) = source
                        && sy < h
                        && sx < w
                    {
                        to[y * w + x] = plane[sy * w + sx];
                    }
                }
            }
        }
    }
    Tensor::from_vec(images, (batch.len(), c, h, w), &Device::Cpu)
}

/// Fisher and Yates, from the end.
fn shuffle(order: &mut [usize], random: &mut ChaCha8Rng) {
    for i in (1..order.len()).rev() {
        order.swap(i, below(random, i + 1));
    }
}

/// Uniform in `0..bound`, by multiply and shift (Lemire 2019, without the rejection: the bias is below 2⁻⁴⁰ here).
fn below(random: &mut ChaCha8Rng, bound: usize) -> usize {
    ((u128::from(random.next_u64()) * bound as u128) >> 64) as usize
}

/// Uniform in `[0, 1)`, of 53 bits.
fn uniform(random: &mut ChaCha8Rng) -> f64 {
    (random.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}
