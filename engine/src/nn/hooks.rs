//! Intermediate results by the names of their modules, for comparison with the original.

use std::cell::RefCell;
use std::fmt::Display;

use burn::tensor::Tensor;

use crate::backend::values_of_tensor;
use crate::error::Result;

/// What a module computed.
#[derive(Clone, Debug, PartialEq)]
pub struct Seen {
    /// Path of the module, in the names of the checkpoint.
    pub name: String,
    /// Shape of the result.
    pub shape: Vec<usize>,
    /// Its values in row-major order.
    pub values: Vec<f32>,
}

/// Collects what modules compute.
#[derive(Debug, Default)]
pub struct Recording(RefCell<Vec<Result<Seen>>>);

impl Recording {
    /// Hooks that record here.
    pub fn hooks(&self) -> Hooks<'_> {
        Hooks { recording: Some(self), prefix: String::new() }
    }

    /// What was computed, in its order.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device) where a result could not be read.
    pub fn finish(self) -> Result<Vec<Seen>> {
        self.0.into_inner().into_iter().collect()
    }
}

/// Where modules show what they compute. Nobody looks at [`Hooks::none`], which costs nothing.
#[derive(Clone, Debug)]
pub struct Hooks<'a> {
    recording: Option<&'a Recording>,
    prefix: String,
}

impl<'a> Hooks<'a> {
    /// Nobody looks.
    pub const fn none() -> Hooks<'static> {
        Hooks { recording: None, prefix: String::new() }
    }

    /// Whether somebody looks.
    pub fn is_recording(&self) -> bool {
        self.recording.is_some()
    }

    /// Hooks of a submodule.
    pub fn at(&self, name: impl Display) -> Hooks<'a> {
        let prefix = self.recording.map(|_| format!("{}{name}.", self.prefix));
        Hooks { recording: self.recording, prefix: prefix.unwrap_or_default() }
    }

    /// Shows the result of the submodule `name`, or with an empty name the module's own.
    pub fn see<const D: usize>(&self, name: &str, result: &Tensor<D>) {
        self.see_as(name, result, |result| result);
    }

    /// Shows a result in the layout that the original has it in.
    pub fn see_as<const D: usize, const E: usize>(
        &self,
        name: &str,
        result: &Tensor<D>,
        layout: impl FnOnce(Tensor<D>) -> Tensor<E>,
    ) {
        let Some(recording) = self.recording else { return };
        let result = layout(result.clone());
        let shape = result.dims().to_vec();
        let name = match name {
            "" => self.prefix.trim_end_matches('.').to_owned(),
            name => format!("{}{name}", self.prefix),
        };
        let seen = values_of_tensor(result).map(|values| Seen { name, shape, values });
        recording.0.borrow_mut().push(seen);
    }
}
