//! The choice of experts.

/// The experts of one token.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// Ids, the largest logit first, equal ones by id.
    pub experts: Vec<u32>,
    /// Softmax over their logits.
    pub weights: Vec<f32>,
}

/// The `active` experts with the largest logits.
pub fn choose(logits: &[f32], active: usize) -> Choice {
    let mut experts: Vec<u32> = (0..logits.len() as u32).collect();
    let logit = |expert: u32| logits[expert as usize];
    // Stable, so that the lower of equals comes first.
    experts.sort_by(|&a, &b| logit(b).total_cmp(&logit(a)));
    experts.truncate(active);
    let largest = experts.first().map_or(0.0, |&expert| logit(expert));
    let mut weights: Vec<f32> = experts.iter().map(|&expert| (logit(expert) - largest).exp()).collect();
    let total: f32 = weights.iter().sum();
    weights.iter_mut().for_each(|weight| *weight /= total);
    Choice { experts, weights }
}

/// Pairs of a token and an expert, sorted by expert.
#[derive(Debug, Default, PartialEq)]
pub struct Groups {
    /// The expert of each group.
    pub experts: Vec<u32>,
    /// Where the pairs of each group begin, and the end of the last.
    pub bounds: Vec<usize>,
    /// The token of each pair.
    pub tokens: Vec<u32>,
    /// Where the pairs of each token went, in the order of its choice.
    pub places: Vec<Vec<usize>>,
}

impl Groups {
    /// Sorts the choices of all tokens.
    pub fn new(choices: &[Choice]) -> Groups {
        let mut pairs: Vec<(u32, u32, usize)> = Vec::new();
        for (token, choice) in (0..).zip(choices) {
            pairs.extend(choice.experts.iter().zip(0..).map(|(&expert, rank)| (expert, token, rank)));
        }
        pairs.sort_unstable();
        let mut groups = Groups { bounds: vec![0], ..Groups::default() };
        groups.places = choices.iter().map(|choice| vec![0; choice.experts.len()]).collect();
        for (place, &(_, token, rank)) in pairs.iter().enumerate() {
            groups.tokens.push(token);
            groups.places[token as usize][rank] = place;
        }
        for run in pairs.chunk_by(|a, b| a.0 == b.0) {
            groups.experts.push(run[0].0);
            groups.bounds.push(groups.bounds[groups.bounds.len() - 1] + run.len());
        }
        groups
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_come_first_and_the_lower_of_equals() {
        let choice = choose(&[1.0, 3.0, 2.0, 3.0, -1.0, 2.0], 3);
        assert_eq!(choice.experts, [1, 3, 2]);
        let e = (-1.0f32).exp();
        let truth = [1.0, 1.0, e].map(|weight| weight / (2.0 + e));
        assert!(choice.weights.iter().zip(truth).all(|(found, truth)| (found - truth).abs() < 1e-6));
    }

    #[test]
    fn groups_hold_every_pair_once() {
        let choices =
            [[4, 1], [1, 0], [4, 0]].map(|ids| Choice { experts: ids.into(), weights: vec![0.5; 2] });
        let groups = Groups::new(&choices);
        assert_eq!(groups.experts, [0, 1, 4]);
        assert_eq!(groups.bounds, [0, 2, 4, 6]);
        assert_eq!(groups.tokens, [1, 2, 0, 1, 0, 2]);
        assert_eq!(groups.places, [[4, 2], [3, 0], [5, 1]]);
    }
}
