"""The toy world: scenes of coloured shapes, their pictures, language, tasks, and an exact judge."""
