//! Arbiters outside an actix main: one actix system for the process, on a thread of its own.
use actix_rt::{Arbiter, ArbiterHandle, System};
use std::sync::{OnceLock, mpsc};

/// The process's actix system; its thread only makes arbiters.
fn system() -> &'static System {
    static SYSTEM: OnceLock<System> = OnceLock::new();
    SYSTEM.get_or_init(|| {
        let (tx, rx) = mpsc::channel();
        std::thread::Builder::new()
            .name("actix-system".into())
            .spawn(move || {
                let runner = System::new();
                // The receiver waits below; if it is gone, so is the process.
                let _ = tx.send(System::current());
                if let Err(error) = runner.run() {
                    tracing::error!(%error, "actix system failed");
                }
            })
            .expect("the operating system refuses a thread at start");
        rx.recv().expect("the system's thread sends before it does anything that can fail")
    })
}

/// Starts a thread with an event loop; it ends when told to stop.
pub(crate) fn start() -> ArbiterHandle {
    // An arbiter can only be made on a thread that knows the system; callers' threads need not.
    let (tx, rx) = mpsc::channel();
    system().arbiter().spawn_fn(move || {
        let _ = tx.send(Arbiter::new().handle());
    });
    rx.recv().expect("the operating system refuses a thread")
}
