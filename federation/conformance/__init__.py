"""Whether another implementation's server keeps to `docs/protocol.md`, statement by statement."""
