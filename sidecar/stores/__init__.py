"""One file, one store. A new store is one new file and one line in the contract test (docs/STORES.md)."""
