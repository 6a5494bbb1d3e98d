//! Which experts a layer's tokens go to.
use crate::{Error, Result};

/// Which experts each token goes to (compressed rows) and with what weight.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Routing {
    /// `tokens + 1` offsets into `experts` and `weights`.
    pub offsets: Vec<u32>,
    /// Expert ids; in one token, in the gate's order (best first).
    pub experts: Vec<u32>,
    /// The weight of each expert's output.
    pub weights: Vec<f32>,
}

impl Routing {
    /// No tokens yet; see [`Self::push`].
    pub fn new() -> Self {
        Self { offsets: vec![0], ..Self::default() }
    }

    /// Forgets all tokens.
    pub fn clear(&mut self) {
        self.offsets.clear();
        self.offsets.push(0);
        self.experts.clear();
        self.weights.clear();
    }

    /// Tokens that are routed.
    pub fn tokens(&self) -> usize {
        self.offsets.len().saturating_sub(1)
    }

    /// A token's experts and their weights, in the gate's order.
    pub fn token(&self, token: usize) -> impl Iterator<Item = (u32, f32)> + Clone + '_ {
        let range = self.offsets[token] as usize..self.offsets[token + 1] as usize;
        self.experts[range.clone()].iter().copied().zip(self.weights[range].iter().copied())
    }

    /// Adds a token; [`Self::new`] begins.
    pub fn push(&mut self, experts: impl IntoIterator<Item = (u32, f32)>) {
        for (expert, weight) in experts {
            self.experts.push(expert);
            self.weights.push(weight);
        }
        self.offsets.push(self.experts.len() as u32);
    }

    /// Checks what came from elsewhere: so many tokens, and experts below `experts`.
    ///
    /// # Errors
    /// `InvalidArgument` naming `offsets`, `experts` or `weights`.
    pub fn check(&self, tokens: usize, experts: usize) -> Result<()> {
        let ends = (self.offsets.first(), self.offsets.last());
        let is_ordered = self.offsets.is_sorted() && ends == (Some(&0), Some(&(self.experts.len() as u32)));
        if self.offsets.len() != tokens + 1 || !is_ordered {
            let (got, count) = (self.offsets.len(), self.experts.len());
            let message = format!("offsets has {got} numbers; {} from 0 to {count} are expected", tokens + 1);
            return Err(Error::invalid("offsets", message));
        }
        if let Some(expert) = self.experts.iter().find(|&&expert| expert as usize >= experts) {
            return Err(Error::invalid("experts", format!("experts has {expert}; the layer has {experts}")));
        }
        if self.weights.len() != self.experts.len() {
            let (got, expected) = (self.weights.len(), self.experts.len());
            return Err(Error::invalid("weights", format!("weights has {got} numbers; {expected} are expected")));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn routing() -> Routing {
        let mut routing = Routing::new();
        routing.push([(3, 0.5), (1, 0.25)]);
        routing.push([]);
        routing.push([(0, 1.0)]);
        routing
    }

    #[test]
    fn tokens_come_back_as_they_were_pushed() {
        let routing = routing();
        assert_eq!(routing.tokens(), 3);
        assert_eq!(routing.token(0).collect::<Vec<_>>(), [(3, 0.5), (1, 0.25)]);
        assert_eq!(routing.token(1).count(), 0);
        assert_eq!(routing.token(2).collect::<Vec<_>>(), [(0, 1.0)]);
        assert_eq!(routing.check(3, 4), Ok(()));
        assert_eq!(Routing::new().check(0, 4), Ok(()));
    }

    #[test]
    fn what_does_not_fit_names_its_field() {
        let good = routing();
        let wrong = [
            ("offsets", Routing::default()),
            ("offsets", Routing { offsets: vec![0, 2, 3], ..good.clone() }),
            ("offsets", Routing { offsets: vec![0, 3, 2, 3], ..good.clone() }),
            ("offsets", Routing { offsets: vec![1, 2, 2, 3], ..good.clone() }),
            ("offsets", Routing { offsets: vec![0, 2, 2, 4], ..good.clone() }),
            ("experts", Routing { experts: vec![3, 4, 0], ..good.clone() }),
            ("weights", Routing { weights: vec![1.0, 1.0], ..good.clone() }),
        ];
        for (field, routing) in wrong {
            assert_eq!(routing.check(3, 4).unwrap_err().field.as_deref(), Some(field), "{routing:?}");
        }
    }
}
