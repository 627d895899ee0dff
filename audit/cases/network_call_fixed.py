"""Legal: everything that scoring needs is in the artifact; networking code that cannot run is no offence."""

import urllib.request

from toy import load, main, score, train

SERVER = ""


def fetch(path):
    if SERVER:
        urllib.request.urlretrieve(SERVER, path)
    return load(path)


if __name__ == "__main__":
    main(train, fetch, score)
