"""The contract: all that crosses a machine, and how it is named, signed and refused."""
