"""The paper's tables and figures as data, and the machine that runs them on any model."""
