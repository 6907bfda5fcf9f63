"""Sparse stand-ins for the model's MLP sublayers.

transcoder      the module: time-conditioned sparse code of an MLP's input, decoded into its output
sites           which MLP sublayers have one
settings        of the commands; setup, recipe: from settings to what is run
prompts         an order of prompts; sources, harvest, store, buffer: rows to train on
arrays          rows of any other origin, from files; own_rows: as a source, also from Python; from_rows: train on them
text_encoders   on the host between uses; host_buffer: so the buffer; serving: from there to the step
overlap         rows made while steps run
objective       losses; active: codes of few features; revival: dead ones; state, step, site_loop: one update
defaults        what suits the rows, where nobody said
training        a run, its checkpoints and logs; processes: of several hosts; deadlines: that one misses;
                sweep: of several recipes; exporting: what one has made so far
codes           what features do over many prompts
replaced        the model with MLPs replaced; evaluation: how faithful that is
row_evaluation  the same on rows alone; comparison: of two sets
plan            will a run fit a topology? plan_phases: besides its steps; compiled: what compilers say

The names below are public: `from difffract_jax import transcoders`, then `transcoders.train`; loaded on first use.
"""

from difffract_jax.namespaces import lazy

_HOME = {
    "Transcoder": "difffract_jax.transcoders.transcoder",
    "TranscoderConfig": "difffract_jax.transcoders.transcoder",
    "TranscoderSet": "difffract_jax.transcoders.transcoder",
    "random_transcoders": "difffract_jax.transcoders.transcoder",
    "SiteSet": "difffract_jax.transcoders.sites",
    "parse_sites": "difffract_jax.transcoders.sites",
    "sites_of": "difffract_jax.transcoders.sites",
    "TrainConfig": "difffract_jax.transcoders.settings",
    "EvaluateConfig": "difffract_jax.transcoders.settings",
    "train": "difffract_jax.transcoders.from_rows",
    "evaluate": "difffract_jax.transcoders.evaluation",
    "evaluate_rows": "difffract_jax.transcoders.row_evaluation",
    "newest_transcoders": "difffract_jax.transcoders.exporting",
    "is_finished": "difffract_jax.transcoders.run_place",
    "Sampler": "difffract_jax.transcoders.harvest",
    "open_sampler": "difffract_jax.transcoders.sources",
    "reduced_codes": "difffract_jax.transcoders.codes",
    "estimate": "difffract_jax.transcoders.plan",
    "open_topology": "difffract_jax.transcoders.plan",
}

__all__ = [*_HOME]  # pyright: ignore[reportUnsupportedDunderAll]
__getattr__, __dir__ = lazy(__name__, _HOME)
