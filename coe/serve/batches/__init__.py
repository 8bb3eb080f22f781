"""Files and batches of the endpoint: `/v1/files` and `/v1/batches`, on the code of `coe batch`.

    service.Batches     what `coe.serve.http.batches` (the endpoints) calls
    files, records      files and batches on disk; every gateway of the service reads and writes the same folder
    claims              which gateway runs which batch
    runner              the life of one batch in the gateway that claimed it
    worker, link        the child process that checks, routes, steps and merges (`coe.batch.run.Batch`)
    answering           the calls of a batch to the expert hosts of the service, charged to its API key

A batch is one run of `coe batch` with another executor. Everything that takes CPU time is in the child process, which
holds no weights. The gateway only sends the expert calls, which are planned in part files, to the hosts that answer its
requests too. So weights are loaded once, and a gateway that restarts goes on where the part files end.
"""
