"""Collections on a PostgreSQL server with pgvector.

Several gateways may use one database at once. `location` needs no driver; the rest needs
psycopg (`pip install 'miaotui[postgres]'`).
"""
