// node winston.mjs PORT COUNT PAUSE BAD: COUNT records, one each PAUSE ms, the one numbered BAD malformed.
// The last line printed is the JSON array of the numbers that Winston told the application it has lost.
import winston from 'winston';

const [port, count, pause, bad] = process.argv.slice(2).map(Number);
const batch = 20;
const http = new winston.transports.Http({
  host: '127.0.0.1', port, path: '/ingest/winston', batch: true, batchCount: batch, batchInterval: 5000,
});
const logger = winston.createLogger({
  defaultMeta: { service: 'winston' },
  format: winston.format.combine(winston.format.timestamp(), winston.format.json()),
  transports: [http],
});
const failed = [];
http.on('warn', (error) => failed.push(error.message));
const sleep = (ms) => new Promise((done) => setTimeout(done, ms));
for (let n = 0; n < count; n++) {
  logger.info('record', n === bad ? { n, text: 'x'.repeat(400000) } : { n });
  await sleep(pause);
}
await sleep(1500); // the last batch, and answers under way
console.log(JSON.stringify(failed));
