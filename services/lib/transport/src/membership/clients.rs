//! A client for each member of a service, made when it is asked for.
use super::directory::Directory;
use super::peers::Peers;
use super::view::View;
use moesaic_types::Result;
use moesaic_types::cluster::Member;
use std::sync::{Arc, Mutex, PoisonError};

type Make<T> = Box<dyn Fn(&Member) -> Result<T> + Send + Sync>;

/// Clients of the members that a directory shows, whatever their state: one that drains still answers.
pub struct Clients<T> {
    directory: Directory,
    make: Make<T>,
    state: Mutex<State<T>>,
}

struct State<T> {
    /// What the peers were made for.
    followed: Arc<View>,
    peers: Peers<T>,
}

impl<T: Clone> Clients<T> {
    /// Clients that `make` makes, each once in a member's life.
    pub fn new(directory: Directory, make: impl Fn(&Member) -> Result<T> + Send + Sync + 'static) -> Self {
        let state = State { followed: Arc::default(), peers: Peers::default() };
        Self { directory, make: Box::new(make), state: Mutex::new(state) }
    }

    /// The directory.
    pub fn directory(&self) -> &Directory {
        &self.directory
    }

    /// A member's client; `None` when there is no such member.
    pub fn get(&self, id: &str) -> Option<T> {
        let view = self.directory.view();
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if !Arc::ptr_eq(&state.followed, &view) {
            state.peers.follow(view.members.values(), &self.make);
            state.followed = view;
        }
        state.peers.get(id).cloned()
    }
}
