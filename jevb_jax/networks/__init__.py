"""Networks: encoders, projector and heads, in Flax Linen."""
