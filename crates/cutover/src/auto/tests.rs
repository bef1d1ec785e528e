//! The choice among backends that say how long they take: their clock is a number, so nothing here depends on the machine.

use super::*;
use cutover_graph::{
    TensorFact,
    ops::{Unary, UnaryFunction},
};
use cutover_tensor::DType;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

#[derive(Default)]
struct Ticks(AtomicU64);

impl Clock for Ticks {
    fn now(&self) -> Duration {
        Duration::from_micros(self.0.load(Ordering::Relaxed))
    }
}

/// Takes `micros` for a run of the model, and `idle_micros` for one of next to nothing.
struct Fake {
    name: &'static str,
    micros: u64,
    idle_micros: u64,
    gflops: f64,
    driver: &'static str,
    fails: bool,
    /// The device is gone, for whatever was compiled for it.
    lost: Arc<AtomicBool>,
    clock: Arc<Ticks>,
    compiled: Arc<AtomicUsize>,
}

struct FakeExecutable {
    name: &'static str,
    micros: u64,
    operations: u64,
    lost: Arc<AtomicBool>,
    clock: Arc<Ticks>,
    signature: Signature,
    placement: Placement,
}

impl Backend for Fake {
    fn describe(&self) -> DeviceInfo {
        DeviceInfo { backend: self.name, device: format!("a fake {}", self.name), isa: String::new(), threads: 1 }
    }

    fn supports(&self, _: &Graph, _: &Node) -> Support {
        Support::Native { kernel: "fake" }
    }

    fn measure_peak(&self) -> Option<Peak> {
        let operations_per_second = self.gflops * 1e9;
        Some(Peak {
            operations_per_second,
            integer_operations_per_second: operations_per_second,
            bytes_per_second: 1e12,
        })
    }

    fn driver(&self) -> Option<String> {
        Some(self.driver.to_string())
    }

    fn compile(&self, plan: &Plan, _: &CompileOptions) -> Result<Arc<dyn Executable>, CompileError> {
        let is_model = plan.graph().name == "model";
        if is_model {
            self.compiled.fetch_add(1, Ordering::Relaxed);
        }
        if is_model && self.fails {
            return Err(CompileError::Options("out of order".to_string()));
        }
        Ok(Arc::new(FakeExecutable {
            name: self.name,
            micros: if is_model { self.micros } else { self.idle_micros },
            operations: 1_000_000,
            lost: Arc::clone(&self.lost),
            clock: Arc::clone(&self.clock),
            signature: Signature::of(plan.graph()),
            placement: Placement::default(),
        }))
    }
}

impl Executable for FakeExecutable {
    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn footprint(&self) -> Footprint {
        Footprint::default()
    }

    fn placement(&self) -> &Placement {
        &self.placement
    }

    fn session(self: Arc<Self>, _: SessionMemory) -> Result<Box<dyn Session>, ResourceError> {
        Ok(Box::new(FakeSession(self)))
    }
}

struct FakeSession(Arc<FakeExecutable>);

impl Session for FakeSession {
    fn run(&mut self, _: &[Input<'_>], _: &mut [Output<'_>], context: &RunContext<'_>) -> Result<(), RunError> {
        let FakeExecutable { name, micros, operations, lost, clock, .. } = &*self.0;
        if lost.load(Ordering::Relaxed) {
            return Err(RunError::DeviceLost("unplugged".to_string()));
        }
        clock.0.fetch_add(*micros, Ordering::Relaxed);
        if let Some(profiler) = context.profiler {
            let (duration, work) =
                (Duration::from_micros(*micros), Work { operations: *operations, ..Work::default() });
            profiler.record(OpTiming { node: "n", op: "Exp", kernel: name, duration, work });
        }
        Ok(())
    }
}

fn model(extent: usize) -> Plan {
    let mut graph = Graph::new("model");
    let x = graph.add_input("x", TensorFact::of_constant_shape(DType::F32, &[1, extent]));
    let op = Unary { function: UnaryFunction::Exp }.into();
    let node = graph.add_node("exp", op, vec![Some(x)], vec!["y".into()]).unwrap();
    graph.set_outputs(graph.node(node).outputs.clone());
    Plan::new(graph).unwrap()
}

/// Backends on one clock.
struct Bench {
    clock: Arc<Ticks>,
    compiled: Arc<AtomicUsize>,
}

impl Bench {
    fn new() -> Bench {
        Bench { clock: Arc::default(), compiled: Arc::default() }
    }

    fn fake(&self, name: &'static str, micros: u64) -> Fake {
        let (clock, compiled) = (Arc::clone(&self.clock), Arc::clone(&self.compiled));
        Fake {
            name,
            micros,
            idle_micros: 1,
            gflops: 1000.0,
            driver: "1",
            fails: false,
            lost: Arc::default(),
            clock,
            compiled,
        }
    }

    fn choose(&self, cpu: Fake, others: Vec<Fake>, choices: Option<std::path::PathBuf>) -> Choice {
        let never = || -> Open { Box::new(|| None) };
        let others = others.into_iter().map(|fake| (Arc::new(fake) as Arc<dyn Backend>, never())).collect();
        let auto = fastest(Arc::new(cpu), others, Choices::at(choices), Arc::clone(&self.clock) as Arc<dyn Clock>);
        let executable = auto.compile(&model(8), &CompileOptions::default()).unwrap();
        executable.choice().unwrap().clone()
    }
}

fn micros(time: Option<Duration>) -> Option<u128> {
    time.map(|time| time.as_micros())
}

#[test]
fn the_faster_one_is_chosen_where_it_wins_by_a_tenth() {
    for (cpu, gpu, expected) in [(1000, 500, "wgpu"), (1000, 900, "wgpu"), (1000, 901, "cpu"), (1000, 5000, "cpu")] {
        let bench = Bench::new();
        let choice = bench.choose(bench.fake("cpu", cpu), vec![bench.fake("wgpu", gpu)], None);
        assert_eq!(choice.device.backend, expected, "{choice:?}");
        assert_eq!(micros(choice.tried[0].measured), Some(u128::from(cpu)));
        assert_eq!(micros(choice.tried[1].measured), Some(u128::from(gpu)));
        // A million operations at 1000 GFLOP/s, and a run of nothing.
        assert_eq!(micros(choice.tried[1].predicted), Some(2));
        assert!(!choice.was_kept);
    }
}

#[test]
fn what_cannot_win_is_not_compiled() {
    let bench = Bench::new();
    // 20 µs of launching are more than the CPU takes for all.
    let slow_to_start = Fake { idle_micros: 20, ..bench.fake("wgpu", 1) };
    let choice = bench.choose(bench.fake("cpu", 10), vec![slow_to_start], None);
    assert_eq!((choice.device.backend, choice.tried[1].measured), ("cpu", None));
    assert!(choice.tried[1].note.starts_with("not tried"), "{choice:?}");
    assert_eq!(bench.compiled.load(Ordering::Relaxed), 1);
    // A peak of 0.01 GFLOP/s takes 100 ms for a million operations.
    let weak = Fake { gflops: 0.01, ..bench.fake("wgpu", 1) };
    let choice = bench.choose(bench.fake("cpu", 1000), vec![weak], None);
    assert_eq!((choice.device.backend, micros(choice.tried[1].predicted)), ("cpu", Some(100_001)));
}

#[test]
fn the_best_of_several_is_chosen_and_a_broken_one_is_no_obstacle() {
    let bench = Bench::new();
    let broken = Fake { fails: true, ..bench.fake("broken", 1) };
    let others = vec![broken, bench.fake("wgpu", 400), bench.fake("cuda", 100), bench.fake("slow", 300)];
    let choice = bench.choose(bench.fake("cpu", 1000), others, None);
    assert_eq!(choice.device.backend, "cuda", "{choice:?}");
    assert_eq!(choice.tried[1].note, "out of order");
    let others = vec![Fake { fails: true, ..bench.fake("broken", 1) }];
    assert_eq!(bench.choose(bench.fake("cpu", 1000), others, None).device.backend, "cpu");
}

#[test]
fn a_choice_is_kept_until_what_it_depends_on_changes() {
    let folder = tempfile::tempdir().unwrap();
    let file = || Some(folder.path().join("cache").join("choices"));
    let compiles = |driver: &'static str| {
        let bench = Bench::new();
        let gpu = Fake { driver, ..bench.fake("wgpu", 100) };
        let choice = bench.choose(bench.fake("cpu", 1000), vec![gpu], file());
        assert_eq!(choice.device.backend, "wgpu");
        assert_eq!(micros(choice.tried[0].measured), Some(1000));
        assert_eq!(choice.tried[1].device, "a fake wgpu");
        (choice.was_kept, bench.compiled.load(Ordering::Relaxed))
    };
    assert_eq!(compiles("1"), (false, 2));
    // Only on the one that was chosen.
    assert_eq!(compiles("1"), (true, 1));
    assert_eq!(compiles("2"), (false, 2));
    assert_eq!(compiles("1"), (true, 1));
    std::fs::remove_dir_all(folder.path().join("cache")).unwrap();
    assert_eq!(compiles("1"), (false, 2));
    // Another file, or half of one, is as none.
    for garbage in [&b"\xFF\xFE"[..], b"cutover choices 1\ngarbage\n\n", b"cutover choices 9\n"] {
        std::fs::write(file().unwrap(), garbage).unwrap();
        assert_eq!(compiles("1"), (false, 2), "{garbage:?}");
        assert_eq!(compiles("1"), (true, 1));
    }
}

#[test]
fn a_kept_choice_whose_backend_no_longer_compiles_is_measured_again() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("choices");
    let bench = Bench::new();
    bench.choose(bench.fake("cpu", 1000), vec![bench.fake("wgpu", 100)], Some(file.clone()));
    let broken = Fake { fails: true, ..bench.fake("wgpu", 100) };
    let choice = bench.choose(bench.fake("cpu", 1000), vec![broken], Some(file));
    assert_eq!((choice.device.backend, choice.was_kept), ("cpu", false));
}

#[test]
fn the_file_is_bounded() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("choices");
    let choices = Choices::at(Some(path.clone()));
    let key = |n: usize| Identity::derived(&n.to_string(), &[]);
    let device = DeviceInfo { backend: "cpu", device: String::new(), isa: String::new(), threads: 1 };
    let choice = Choice { device, tried: Vec::new(), was_kept: false };
    (0..600).for_each(|n| choices.keep(&key(n), &choice));
    let text = std::fs::read_to_string(&path).unwrap();
    assert_eq!(text.lines().count(), 513);
    assert!(choices.find(&key(599)).is_some() && choices.find(&key(0)).is_none());
    // A place that can't be written costs nothing but the memory of it.
    Choices::at(Some("/proc/none/choices".into())).keep(&key(1), &choice);
    assert!(Choices::at(None).find(&key(1)).is_none());
}

/// Which fake a run of the session was on.
fn ran_on(session: &mut dyn Session, executable: &Arc<dyn Executable>) -> String {
    #[derive(Default)]
    struct Name(Mutex<String>);
    impl Profiler for Name {
        fn record(&self, timing: OpTiming<'_>) {
            *self.0.lock().unwrap() = timing.kernel.to_string();
        }
    }
    let name = Name::default();
    let inputs = zeros(executable.signature(), EXTENTS[0]).unwrap();
    run(session, executable, &inputs, &RunContext { profiler: Some(&name), ..RunContext::default() }).unwrap();
    name.0.into_inner().unwrap()
}

#[test]
fn what_loses_its_device_runs_on_the_cpu_until_that_is_back() {
    let bench = Bench::new();
    let (gpu, again) = (bench.fake("wgpu", 100), bench.fake("wgpu again", 100));
    let (lost, lost_again) = (Arc::clone(&gpu.lost), Arc::clone(&again.lost));
    let (again, is_there): (Arc<dyn Backend>, Arc<AtomicBool>) = (Arc::new(again), Arc::default());
    let (opened, there) = (Arc::new(AtomicUsize::new(0)), Arc::clone(&is_there));
    let (count, device) = (Arc::clone(&opened), Arc::clone(&again));
    let open: Open = Box::new(move || {
        count.fetch_add(1, Ordering::Relaxed);
        there.load(Ordering::Relaxed).then(|| Arc::clone(&device))
    });
    let (gpu, cpu): (Arc<dyn Backend>, Arc<dyn Backend>) = (Arc::new(gpu), Arc::new(bench.fake("cpu", 1000)));
    let other = Arc::new(Other::new(Arc::clone(&gpu), open));
    let (plan, options) = (model(8), CompileOptions::default());
    let executable = gpu.compile(&plan, &options).unwrap();
    let wait = Some(Duration::from_millis(2));
    let model: Arc<dyn Executable> = lost::Surviving::new([cpu, gpu], other, executable, &plan, &options, wait);
    let mut sessions = [(); 2].map(|()| Arc::clone(&model).session(SessionMemory::default()).unwrap());
    let mut ran = |at: usize| ran_on(&mut *sessions[at], &model);
    assert_eq!([ran(0), ran(1)], ["wgpu", "wgpu"]);
    // The request that finds it out is answered, and nobody else notices.
    lost.store(true, Ordering::Relaxed);
    assert_eq!([ran(0), ran(1)], ["cpu", "cpu"]);
    assert_eq!(ran_on(&mut *Arc::clone(&model).session(SessionMemory::default()).unwrap(), &model), "cpu");
    let until = |is: &dyn Fn() -> bool| {
        let start = Instant::now();
        while !is() {
            assert!(start.elapsed() < Duration::from_secs(30), "nothing happens");
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    until(&|| opened.load(Ordering::Relaxed) > 1);
    assert_eq!(ran(0), "cpu");
    is_there.store(true, Ordering::Relaxed);
    let start = Instant::now();
    while ran(0) == "cpu" {
        assert!(start.elapsed() < Duration::from_secs(30), "it stays on the CPU");
    }
    assert_eq!([ran(0), ran(1)], ["wgpu again", "wgpu again"]);
    // And once more.
    lost_again.store(true, Ordering::Relaxed);
    assert_eq!([ran(0), ran(1)], ["cpu", "cpu"]);
}

#[test]
fn models_of_another_structure_have_a_choice_of_their_own() {
    let bench = Bench::new();
    let auto = Fastest {
        cpu: Arc::new(bench.fake("cpu", 1)),
        others: Vec::new(),
        choices: Choices::at(None),
        clock: Arc::clone(&bench.clock) as Arc<dyn Clock>,
    };
    let options = CompileOptions::default();
    assert_eq!(auto.key(&model(8), &options), auto.key(&model(8), &options));
    assert_ne!(auto.key(&model(8), &options), auto.key(&model(9), &options));
    let half = CompileOptions { precision: cutover_backend::Precision::F16, ..options };
    assert_ne!(auto.key(&model(8), &options), auto.key(&model(8), &half));
}
