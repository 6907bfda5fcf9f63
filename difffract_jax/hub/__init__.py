"""Repositories on the Hugging Face Hub, downloaded as far as the package reads them (needs the extra `hub`).

    names         how a repository is written where a directory could stand
    repository    what a repository holds, and its files in the cache of this machine
    failures      what went wrong, in one sentence that says what to do

The client is `huggingface_hub`: the cache, the progress bar, access tokens and retries are its own, and so are the
environment variables that steer them (HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE). Nothing here loads it before a
repository is asked for.
"""
