"""A PRT model as a teacher: its distribution at the positions where a student is judged."""

from numbers import Real

import torch

from ..contract import TEXT_GENERATION
from ..errors import UnsupportedError
from ..inference.prt_model import PRTPreTrainedModel
from ..networks.lm_head import Head, Projection, last_hidden_state, projection, why_not_projected
from ..networks.pixels import split_inputs
from ..reward.batch import Batch


class Teacher:
    """log pi_theta(. | x) of a PRT model, over its backbone's tokens or labels.

    Args:
        model ([`PRTPreTrainedModel`]): stays as it is.

    Raises:
        UnsupportedError: its strengths differ from row to row.
    """

    def __init__(self, model: PRTPreTrainedModel):
        if not all(isinstance(factor, Real) for factor in model.factors()):
            raise UnsupportedError(
                "A baked model has one strength for each reward.",
                expected="`model.strengths` with one number for each reward",
                found="strengths per row",
            )
        self.model = model.eval()

    @property
    def columns(self) -> slice:
        """The columns of the backbone's logits that it has probabilities for, without those that pad a vocabulary."""
        return self.model.parts[0].columns

    def projection(self, batch: Batch) -> Projection:
        """Return log pi_theta at the supervised positions, up to constants, as a product that is not computed yet.

        softmax(b + s r) with b = h_b W_b^T and r = h_r W_r^T is that of the logits [h_b, s h_r] [W_b, W_r]^T.
        """
        hidden, weights, biases = [], [], []
        with torch.no_grad():
            for part, factor in zip(self.model.parts, self.model.factors(), strict=True):
                network = part.run.network
                states = batch.chosen(last_hidden_state(network, part.run.prepare(batch.inputs)))
                piece = projection(network, states, part.columns)
                hidden += [factor * each for each in piece.hidden]
                weights += piece.weights
                biases += [] if piece.bias is None else [factor * piece.bias]
        return Projection(tuple(hidden), tuple(weights), sum(biases) if biases else None)

    def log_probs(self, batch: Batch) -> torch.Tensor:
        """Return log pi_theta at the supervised positions, `(n, vocab_size)`, or of a classifier, `(n, num_labels)`."""
        with torch.no_grad():
            return batch.chosen(self.model(**batch.inputs).logits)

    def why_not_projected(self, batch: Batch) -> str | None:
        """Return why [`projection`] would be wrong; None if it is right."""
        if self.model.task != TEXT_GENERATION:
            return "a classifier has few labels"
        if any(match.columns is not None or match.is_across for match in self.model.matches):
            return "a reward of another vocabulary"
        for part in self.model.parts:
            network = part.run.network
            if Head.of(network).softcap is not None:
                return f"{type(part.run.model).__name__} has soft-capped logits"
            if problem := why_not_projected(network, part.run.prepare(batch.inputs)):
                return problem
        return None

    def inputs_of_student(self, inputs: dict) -> dict:
        """Return the inputs of the backbone alone, without pixels of single rewards."""
        return split_inputs(inputs, "reward", len(self.model.rewards))[0]
