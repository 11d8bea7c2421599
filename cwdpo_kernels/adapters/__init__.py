"""Drop-ins with the signatures of other projects, over the public functions; none of those projects is needed."""
