//! What runs on when a device is lost: the CPU, until the device is there again.
//!
//! A request whose device is lost in the middle of it is answered by the CPU. A thread then opens the device again, a second later at first
//! and then ever more seldom, compiles the model for it, and requests go back to it. The thread ends with the model.

use super::{Other, made_up, run};
use cutover_backend::{
    Backend, CompileError, CompileOptions, Executable, Footprint, Input, Output, Placement, ResourceError, RunContext,
    RunError, Session, SessionMemory, Signature,
};
use cutover_graph::Plan;
use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

/// How long nobody looks for a lost device, at first and at most.
const WAIT: Duration = Duration::from_secs(1);
const LONGEST_WAIT: Duration = Duration::from_secs(64);

/// A model on a device that may be lost.
pub(super) struct Surviving {
    plan: Plan,
    options: CompileOptions,
    cpu: Arc<dyn Backend>,
    other: Arc<Other>,
    wait: Duration,
    /// As it was compiled first: what is said of the model is said of this.
    first: Arc<dyn Executable>,
    current: Mutex<Current>,
}

/// Where requests go.
struct Current {
    executable: Arc<dyn Executable>,
    /// The device's backend; `None` on the CPU.
    device: Option<Arc<dyn Backend>>,
    /// Counts changes.
    change: u64,
}

impl Surviving {
    /// `executable`, which `device` compiled; `other` opens that again.
    pub fn new(
        [cpu, device]: [Arc<dyn Backend>; 2],
        other: Arc<Other>,
        executable: Arc<dyn Executable>,
        plan: &Plan,
        options: &CompileOptions,
        wait: Option<Duration>,
    ) -> Arc<Surviving> {
        let first = Arc::clone(&executable);
        let current = Mutex::new(Current { executable, device: Some(device), change: 0 });
        let (plan, wait) = (plan.clone(), wait.unwrap_or(WAIT));
        Arc::new(Surviving { plan, options: *options, cpu, other, wait, first, current })
    }

    fn current(&self) -> MutexGuard<'_, Current> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The device of change `change` is lost: whoever says so first has the model compiled for the CPU, and the device looked for.
    fn lost(self: &Arc<Self>, change: u64, message: &str) -> Result<(), CompileError> {
        let mut current = self.current();
        if current.change != change {
            return Ok(());
        }
        let Some(device) = current.device.take() else { return Ok(()) };
        let name = device.describe();
        tracing::warn!("'{}' ({}) is lost, and the CPU runs on: {message}", name.device, name.backend);
        current.executable = self.cpu.compile(&self.plan, &self.options)?;
        current.change += 1;
        let (weak, wait) = (Arc::downgrade(self), self.wait);
        let looking = std::thread::Builder::new().name("lost device".to_string());
        if let Err(error) = looking.spawn(move || look_for(&weak, &device, wait)) {
            tracing::warn!("nobody looks for the lost device: {error}");
        }
        Ok(())
    }

    /// The model on the device as it is there again.
    fn again(&self, lost: &Arc<dyn Backend>) -> Option<(Arc<dyn Executable>, Arc<dyn Backend>)> {
        let device = self.other.again(lost)?;
        let executable = device.compile(&self.plan, &self.options).ok()?;
        // A run, or where none can be made up the compiling, shows that it works.
        if let Some(inputs) = made_up(&executable) {
            let mut session = Arc::clone(&executable).session(SessionMemory::default()).ok()?;
            run(&mut *session, &executable, &inputs, &RunContext::default()).ok()?;
        }
        Some((executable, device))
    }
}

/// Looks for a lost device until it is there, or nobody needs it.
fn look_for(model: &Weak<Surviving>, lost: &Arc<dyn Backend>, mut wait: Duration) {
    loop {
        std::thread::sleep(wait);
        let Some(model) = model.upgrade() else { return };
        if let Some((executable, device)) = model.again(lost) {
            let mut current = model.current();
            tracing::info!("'{}' is there again", device.describe().device);
            (current.executable, current.device) = (executable, Some(device));
            current.change += 1;
            return;
        }
        wait = (wait * 2).min(LONGEST_WAIT);
    }
}

impl Executable for Surviving {
    fn signature(&self) -> &Signature {
        self.first.signature()
    }

    fn footprint(&self) -> Footprint {
        self.first.footprint()
    }

    fn weights(&self, visit: &mut dyn FnMut(usize, u64)) {
        self.first.weights(visit);
    }

    fn placement(&self) -> &Placement {
        self.first.placement()
    }

    fn session(self: Arc<Self>, memory: SessionMemory) -> Result<Box<dyn Session>, ResourceError> {
        let (executable, change) = {
            let current = self.current();
            (Arc::clone(&current.executable), current.change)
        };
        let session = executable.session(memory.clone())?;
        Ok(Box::new(SurvivingSession { model: self, memory, session, change }))
    }
}

struct SurvivingSession {
    model: Arc<Surviving>,
    memory: SessionMemory,
    session: Box<dyn Session>,
    change: u64,
}

impl Session for SurvivingSession {
    fn run(
        &mut self,
        inputs: &[Input<'_>],
        outputs: &mut [Output<'_>],
        context: &RunContext<'_>,
    ) -> Result<(), RunError> {
        loop {
            let (executable, change, is_on_device) = {
                let current = self.model.current();
                (Arc::clone(&current.executable), current.change, current.device.is_some())
            };
            if change != self.change {
                self.session = executable.session(self.memory.clone())?;
                self.change = change;
            }
            match self.session.run(inputs, outputs, context) {
                Err(RunError::DeviceLost(message)) if is_on_device => {
                    let lost = self.model.lost(change, &message);
                    lost.map_err(|error| RunError::DeviceLost(format!("{message}; nor does the CPU run it: {error}")))?;
                }
                result => return result,
            }
        }
    }
}
