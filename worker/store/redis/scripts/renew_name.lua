-- Renews the lease of the service that owns a consumer's name.
-- Called by RedisReaderStore.renew_name, after prelude_epoch.lua and prelude_name.lua. Atomic: the epoch must still be
-- the caller's when the record is written.
-- KEYS[1] stream  KEYS[2] fence hash
-- ARGV[1] group   ARGV[2] consumer   ARGV[3] epoch   ARGV[4] token   ARGV[5] lease in ms
-- ARGV[6] description of the caller
-- Returns 1.
write_record(ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6])
return 1
