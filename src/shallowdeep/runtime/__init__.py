"""Where networks run for their answers: the engine and its backends."""
